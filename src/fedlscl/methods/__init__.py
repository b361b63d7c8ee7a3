"""One file per method; importing the package makes the short class names known to the command line."""

from fedlscl.methods.controls import FedNCM, FedRidge
from fedlscl.methods.ewc import EWC
from fedlscl.methods.fedavg import FedAvg, Local
from fedlscl.methods.fedlscl import FedLSCL
from fedlscl.methods.fedprox import FedProx
from fedlscl.methods.lwf import LwF

__all__ = ["EWC", "FedAvg", "FedLSCL", "FedNCM", "FedProx", "FedRidge", "Local", "LwF"]
