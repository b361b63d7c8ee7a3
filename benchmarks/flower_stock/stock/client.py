"""Trains the CNN on the client's first task."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    from stock.task import build, train

    net = build()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    number = train(net, int(context.node_config["partition-id"]))
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": number})}
    return Message(RecordDict(content), reply_to=message)
