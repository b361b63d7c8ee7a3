"""One file per method; importing the package makes the short class names known to the command line."""

from fedlscl.methods.fedavg import EWC, FedAvg, FedProx, Local, LwF
from fedlscl.methods.fedbe import FedBE
from fedlscl.methods.fedlscl import FedLSCL
from fedlscl.methods.fedweit import FedWeIT
from fedlscl.methods.glfc import GLFC
from fedlscl.methods.joint import Joint, JointLSCL
from fedlscl.methods.lorm import LoRM
from fedlscl.methods.mfcl import MFCL
from fedlscl.methods.pilora import PILoRA
from fedlscl.methods.prompts import FedDualP, FedL2P, FedMGP
from fedlscl.methods.target import TARGET
from fedlscl.methods.training_free import AFCL, STSA, STSAE, FedNCM, FedRAN, FedRidge, FrozenLDA

__all__ = [
    "AFCL",
    "EWC",
    "GLFC",
    "MFCL",
    "STSA",
    "STSAE",
    "TARGET",
    "FedAvg",
    "FedBE",
    "FedDualP",
    "FedL2P",
    "FedLSCL",
    "FedMGP",
    "FedNCM",
    "FedProx",
    "FedRAN",
    "FedRidge",
    "FedWeIT",
    "FrozenLDA",
    "Joint",
    "JointLSCL",
    "LoRM",
    "Local",
    "LwF",
    "PILoRA",
]
