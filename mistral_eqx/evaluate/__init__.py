from .scoring import Scores as Scores, score as score
from .windows import Perplexity as Perplexity, perplexity as perplexity
