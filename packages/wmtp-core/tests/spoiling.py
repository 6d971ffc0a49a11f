"""Recorder of the interface of CUDA graphs that needs no GPU."""

import torch


class Spoiling:
    """Recorder whose replays run functions again and write into the first results.

    They spoil all that others have given, as graphs that share memory may.
    """

    def __init__(self):
        self.given = []

    def warm_up(self, function):
        function()

    def record(self, function):
        results = function()
        self.given += [tensor.detach() for tensor in results if tensor is not None]

        def replay():
            with torch.no_grad():
                for tensor in self.given:
                    tensor.fill_(torch.nan)
            with torch.enable_grad():
                again = function()
            with torch.no_grad():
                for old, new in zip(results, again, strict=True):
                    if old is not None:
                        old.detach().copy_(new)

        return results, replay

    def wait(self):
        pass
