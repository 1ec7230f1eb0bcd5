"""Step 2: train with binary activations and binary weights, without weight decay, from step 1.

The signs that step 1 found are kept dependable: without weight decay the latent weights are no
longer pulled towards 0, where every sign is one update away from flipping.
Every option below is a line of config.yaml or has a default.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build_model
from models.teacher import load_teacher
from utils import engine
from utils.checkpoint import Checkpoint, load_strictly, read_checkpoint, resume
from utils.command_line import command
from utils.config import Config, parse_config
from utils.data import open_images, train_loader, val_loader
from utils.distributed import Process, broadcast_buffers, distribute, training_process
from utils.errors import InputError
from utils.files import is_there
from utils.keeping import Keeper, run_folder
from utils.limits import limits_told
from utils.live import live_measures
from utils.optim import build_optimizer, describe_groups, learning_rate, set_learning_rate
from utils.precision import compiled, place, set_precision
from utils.runlog import RunLog, epoch_record


@command
def main() -> None:
    config = parse_config(Path(__file__).with_name("config.yaml"), description=__doc__)
    with (
        training_process() as process,
        run_folder(config.save, process),
        limits_told(config, process),
    ):
        train(config, process)


def train(config: Config, process: Process) -> None:
    device = process.device
    train_images, val_images = open_images(config, process)
    train_batches = train_loader(train_images, config, process)
    val_batches = val_loader(val_images, config, process)
    classes = len(train_images.classes)

    set_precision(config.precision)
    torch.manual_seed(config.seed)
    student = build_model(config.model, num_classes=classes, **config.network_options())
    place(student, device, config.channels_last)
    optimizer = build_optimizer(
        student,
        config.learning_rate,
        config.weight_decay,
        config.decay_group,
        config.optimizer,
        config.optimizer_options,
    )

    resumed = resume(config, process, student, optimizer)
    history = resumed.history
    if resumed.start:
        start = resumed.start
    elif config.init_from:
        start = read_step1(config.init_from)
        load_strictly(student, start)
    else:
        start = "scratch"
    teacher = load_teacher(
        config.teacher, config.teacher_checkpoint, classes, config.image_size, device
    )
    teacher = compiled(place(teacher, device, config.channels_last), config.compile)
    measures = live_measures(config, process, student, val_images, resumed.measures)
    network = compiled(student, config.compile)
    model = distribute(network, process, config.sync_bn)
    with (
        RunLog(config, process, history) as log,
        Keeper(config, process, log, student, optimizer, measures, resumed) as keeper,
    ):
        log.opening(config, process, start, describe_groups(optimizer))
        for epoch in range(len(history), config.epochs):
            rate = learning_rate(epoch, config.learning_rate, config.epochs, config.schedule)
            set_learning_rate(optimizer, rate)
            keeper.start_epoch(epoch, train_batches.batch_sampler)
            trained = engine.train_one_epoch(
                model,
                teacher,
                train_batches,
                optimizer,
                device,
                config.label_smoothing,
                config.precision,
                config.accumulate,
                log.progress(f"epoch {epoch} train", keeper.iteration),
                keeper.after_step,
                keeper.meter,
            )
            broadcast_buffers(student)
            validated = engine.validate(
                network, val_batches, device, config.precision, log.progress(f"epoch {epoch} val")
            )
            history.append(epoch_record(epoch, rate, trained, validated, measures.epoch()))
            keeper.save_epoch()
            log.epoch(history)
        log.closing(history)


def read_step1(path: str) -> Checkpoint:
    """The checkpoint that step 1 left: latent weights, and everything else, for step 2."""
    if not is_there(Path(path)):
        raise InputError(
            f"step 2 starts from step 1, and there is no {path}:"
            " run step 1 first (bash step1/run.sh), or pass --init_from with its checkpoint"
        )
    return read_checkpoint(path)


if __name__ == "__main__":
    main()
