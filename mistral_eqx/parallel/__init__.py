from .collectives import psum as psum
from .strategy import SINGLE as SINGLE, Strategy as Strategy
