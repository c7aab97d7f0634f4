from .answer import Answer as Answer, Event as Event, Finish as Finish, LogProb as LogProb
from .engine import Engine as Engine, Full as Full, Load as Load
from .request import Request as Request
