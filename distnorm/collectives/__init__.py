"""Ranks, their groups and the few exchanges that distnorm makes: the only room that talks to `torch.distributed`.

A layer never holds a process group; it names its ranks (`sync_ranks` or `group_ranks`) and asks here, so that it can be
copied, pickled and moved to another cluster. Without a process group every function answers for one rank alone.
"""

from distnorm.collectives.control import Vote as Vote
from distnorm.collectives.control import start_vote as start_vote
from distnorm.collectives.exchange import Pending as Pending
from distnorm.collectives.exchange import agree as agree
from distnorm.collectives.exchange import gather as gather
from distnorm.collectives.exchange import raise_named as raise_named
from distnorm.collectives.exchange import raise_together as raise_together
from distnorm.collectives.exchange import start_gather as start_gather
from distnorm.collectives.exchange import start_notice as start_notice
from distnorm.collectives.exchange import start_sum as start_sum
from distnorm.collectives.groups import adopt as adopt
from distnorm.collectives.groups import make_twins as make_twins
from distnorm.collectives.groups import members as members
from distnorm.collectives.groups import set_debug as set_debug
from distnorm.collectives.marks import count_layer as count_layer
from distnorm.collectives.marks import forget_layer as forget_layer
from distnorm.collectives.marks import order_of_checked as order_of_checked
from distnorm.collectives.marks import place_of as place_of
from distnorm.collectives.meeting import Meeting as Meeting
from distnorm.collectives.meeting import come_together as come_together
from distnorm.collectives.world import agreed_through_launcher as agreed_through_launcher
from distnorm.collectives.world import end_process as end_process
from distnorm.collectives.world import end_ranks as end_ranks
from distnorm.collectives.world import is_running as is_running
from distnorm.collectives.world import rank as rank
from distnorm.collectives.world import start_ranks as start_ranks
from distnorm.collectives.world import store as store
from distnorm.collectives.world import world_size as world_size
