"""One file per method; importing the package makes the short class names known to the command line."""

from fedlscl.methods.controls import FedNCM, FedRidge
from fedlscl.methods.ewc import EWC
from fedlscl.methods.fedavg import FedAvg, Local
from fedlscl.methods.fedbe import FedBE
from fedlscl.methods.feddualp import FedDualP
from fedlscl.methods.fedl2p import FedL2P
from fedlscl.methods.fedlscl import FedLSCL
from fedlscl.methods.fedmgp import FedMGP
from fedlscl.methods.fedprox import FedProx
from fedlscl.methods.fedweit import FedWeIT
from fedlscl.methods.glfc import GLFC
from fedlscl.methods.joint import Joint, JointLSCL
from fedlscl.methods.lorm import LoRM
from fedlscl.methods.lwf import LwF
from fedlscl.methods.mfcl import MFCL
from fedlscl.methods.pilora import PILoRA
from fedlscl.methods.target import TARGET

__all__ = [
    "EWC",
    "GLFC",
    "MFCL",
    "TARGET",
    "FedAvg",
    "FedBE",
    "FedDualP",
    "FedL2P",
    "FedLSCL",
    "FedMGP",
    "FedNCM",
    "FedProx",
    "FedRidge",
    "FedWeIT",
    "Joint",
    "JointLSCL",
    "LoRM",
    "Local",
    "LwF",
    "PILoRA",
]
