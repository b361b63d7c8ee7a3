"""Flower's FedAvg as it comes."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from stock.task import build

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    arrays = ArrayRecord(build().state_dict())
    strategy.start(grid, arrays, num_rounds=int(context.run_config["rounds"]), timeout=900)
