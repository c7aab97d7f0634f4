from .perplexity import Perplexity as Perplexity, perplexity as perplexity
from .score import Scores as Scores, score as score
