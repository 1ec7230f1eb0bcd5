"""Step 2: binary activations and binary weights, without weight decay, from step 1.

Without weight decay the latent weights are not pulled towards 0, where every sign is one update
away from flipping.  Every option below is a line of config.yaml or has a default.
"""

import sys
from pathlib import Path

import torch
from torch import nn

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
from utils.run.errors import UserError
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

    # The student: Sign binarizes the activations, mean|w| * Sign(w) the weights.
    set_precision(config.precision)
    torch.manual_seed(config.seed)
    student = build_model(config.model, num_classes=num_classes, **config.network_options())
    place(student, config, dist.device)
    # Adam, without weight decay, which would pull latent weights to 0, where signs flip.
    optimizer = build_optimizer(student, config)
    # The softmax of the teacher is the student's target.
    teacher = load_teacher(config, num_classes, dist.device)

    # An interrupted run goes on; a new one starts from the best of step 1.
    state = TrainState()
    metrics = build_metrics(config, dist, student, val_loader.dataset)
    checkpoints = CheckpointManager(config, dist, student, optimizer, metrics, state)
    start = checkpoints.resume()
    if not start:
        start = load_step1_weights(student, config.init_from)
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


def load_step1_weights(student: nn.Module, path: str | None) -> str:
    """Load what step 1 left as latent weights; None starts from scratch, as one-step training."""
    if path and not Path(path).exists():
        raise UserError(
            f"there is no {path} to start from: run step 1 first (bash step1/run.sh),"
            " or pass --init_from with its checkpoint"
        )
    return load_initial_weights(student, path)


if __name__ == "__main__":
    main()
