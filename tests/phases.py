"""Which batches of a run were in FP8, for the tests of schedules and evaluation."""

from lightning.pytorch import Callback

from lightning_fp8.compute.gemm import record_gemms


class Gemms(Callback):
    """How many FP8 GEMMs each batch ran, of training and of evaluation."""

    def __init__(self):
        self.training, self.evaluation = [], []

    def setup(self, trainer, pl_module, stage):
        self.recording = record_gemms()
        self.gemms = self.recording.__enter__()

    def teardown(self, trainer, pl_module, stage):
        self.recording.__exit__(None, None, None)

    def on_train_batch_start(self, *_):
        self.gemms.clear()

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_train_batch_end(self, *_):
        self.training.append(len(self.gemms))

    def on_validation_batch_end(self, *_):
        self.evaluation.append(len(self.gemms))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def phases(counts):
    """One letter a batch: F for FP8, B for bf16."""
    return "".join("F" if count else "B" for count in counts)
