"""The clock as a callback of `transformers.Trainer`. Measures nothing itself."""

from transformers import TrainerCallback


class ClockCallback(TrainerCallback):
    def __init__(self, clock, images):
        self.clock = clock
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.clock.start_epoch()

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.start_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.clock.end_training_of_epoch(self.images)
