from .score import Scores as Scores, score as score
