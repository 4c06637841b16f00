import csv
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

accumulator = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})  # 0: all points, not a sample of them
accumulator.Reload()
points = [(tag, event.step, event.value) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)]
csv.writer(sys.stdout, lineterminator="\n").writerows([("tag", "step", "value"), *points])
