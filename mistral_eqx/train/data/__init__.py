from .adder import Adder as Adder
from .batches import Batches as Batches, BatchIterator as BatchIterator, batches as batches
from .characters import Characters as Characters
from .json_lines import JSONLines as JSONLines
from .parquet import Parquet as Parquet
from .pieces import Pieces as Pieces
from .problems import AbstractProblems as AbstractProblems
from .sort import Sort as Sort
from .text_file import TextFile as TextFile
from .texts import AbstractTexts as AbstractTexts
from .tokens import Tokens as Tokens, tokenise as tokenise
from .usable import Usable as Usable
