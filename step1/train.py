"""Step 1: binary activations, real-valued weights, with weight decay, from scratch.

Weights are real-valued: weight decay frees them from their initialization, and there is no sign yet
that it could flip.  Step 2 starts from what is found here and binarizes the weights as well.
Every option below is a line of config.yaml or has a default.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build_model
from models.teacher import load_teacher
from utils.checkpoint.checkpoint import load_initial_weights
from utils.checkpoint.manager import CheckpointManager, run_session
from utils.data.loader import build_loaders
from utils.engine import evaluate, train_one_epoch
from utils.metrics import build_metrics
from utils.optim import build_optimizer, describe_groups, set_learning_rate
from utils.precision import compiled, place, set_precision
from utils.run.command_line import command
from utils.run.config import Config, parse_config
from utils.run.distributed import DistEnv, broadcast_buffers, distribute
from utils.run.logging import RunLog
from utils.run.state import TrainState


@command
def main() -> None:
    config = parse_config(Path(__file__).with_name("config.yaml"), description=__doc__)
    with run_session(config) as dist:
        train(config, dist)


def train(config: Config, dist: DistEnv) -> None:
    train_loader, val_loader = build_loaders(config, dist)
    num_classes = len(train_loader.dataset.classes)

    # The student: Sign binarizes the activations, the weights are used as they are.
    set_precision(config.precision)
    torch.manual_seed(config.seed)
    student = build_model(config.model, num_classes=num_classes, **config.network_options())
    place(student, config, dist.device)
    # Adam, with weight decay: it keeps training stable, and no sign of a weight is used yet.
    optimizer = build_optimizer(student, config)
    # The softmax of the teacher is the student's target.
    teacher = load_teacher(config, num_classes, dist.device)

    # An interrupted run goes on; a new one starts from scratch.
    state = TrainState()
    metrics = build_metrics(config, dist, student, val_loader.dataset)
    checkpoints = CheckpointManager(config, dist, student, optimizer, metrics, state)
    start = checkpoints.resume()
    if not start:
        start = load_initial_weights(student, config.init_from)
        metrics.set_initial_signs()

    network = compiled(student, config)
    model = distribute(network, dist, config.sync_bn)
    log = RunLog(config, dist, state, iterations=len(train_loader))
    state.hooks = [metrics, checkpoints, log]
    with log, checkpoints:
        log.opening(start, describe_groups(optimizer))
        for epoch in range(state.epoch, config.epochs):
            rate = set_learning_rate(optimizer, epoch, config)
            train_loader.set_epoch(epoch, start_batch=state.iteration)
            trained = train_one_epoch(model, teacher, train_loader, optimizer, config, state)
            broadcast_buffers(student)
            validated = evaluate(network, val_loader, config.precision).results()
            state.end_epoch(rate, trained, validated, metrics.summary())
        log.closing(state)


if __name__ == "__main__":
    main()
