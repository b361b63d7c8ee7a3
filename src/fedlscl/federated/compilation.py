"""torch.compile for small models, where somebody wants it."""

from typing import Literal

from fedlscl.nets.cnn import SmallModel
from fedlscl.nets.net import Net

Compile = Literal["auto", "on", "off"]
"""'on' compiles small models; 'off' and 'auto' do not.

'auto' stands for what measures faster. On two CPU cores compilation gained under 8 % of a step for 15 to 26 s per net
and batch size, more than a client's turn takes; on a GPU it was not measured, so it stays off there, too.
"""


def compile_small_models(net: Net, choice: Compile) -> None:
    """Compile a net's CNN in place, once; state dicts and copies of the net are as without."""
    if choice != "on":
        return
    for part in net.modules():
        if isinstance(part, SmallModel) and part._compiled_call_impl is None:
            part.compile()
