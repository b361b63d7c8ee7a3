"""One place in the streams as a plain datamodule."""

from typing import TYPE_CHECKING

import lightning as L
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from fedlscl.data.datamodule import SpatialTemporalDataModule


class PlaceDataModule(L.LightningDataModule):
    """One place in the streams, for a stock ``lightning.Trainer``."""

    def __init__(self, streams: "SpatialTemporalDataModule", client: int | None, task: int | None) -> None:
        super().__init__()
        self.streams = streams
        self.client = client
        self.task = task

    def setup(self, stage: str | None = None) -> None:
        """Load and split, if that was not done yet."""
        self.streams.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Shuffled train samples of this place."""
        return self.streams.train_dataloader(self.client, self.task)

    def test_dataloader(self) -> DataLoader:
        """Test samples of this place."""
        return self.streams.test_dataloader(self.client, self.task)

    val_dataloader = test_dataloader
    predict_dataloader = test_dataloader
