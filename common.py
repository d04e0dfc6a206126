"""What all scripts share: seeds, evaluate, EMA, fit, the files of a run.

    python common.py --recipes                 the recipes as a table

A training script hands fit() a model, batches, and loss_fn(model, batch) -> (loss, logits); the
rest is here. Recipes: recipes.py; flags: flags.py; run folders: runs.py; device: device.py.
"""
from flags import RECIPES, Parser, fail, launch, recipes_table, same_in_all, say  # noqa: I001
import copy
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cards
import device
import runs
from device import autocast, pick_device, rank, silent, summed, tell_time, world  # noqa: F401
from files import damage, write_whole

# ---- seeds ------------------------------------------------------------------------------------

# One stream for each use, so that no use of random numbers shifts another.
STREAMS = {name: i for i, name in enumerate((
    "weights", "labels", "order", "view", "other view", "noise", "other noise"))}


def seed_for(seed, stream, *more):
    """Return a 32-bit seed for one use in one epoch; neighbours are not alike, as seed + e is."""
    return int(np.random.SeedSequence((seed, STREAMS[stream], *more)).generate_state(1)[0])


def generator(seed, stream, *more, device="cpu"):
    """Return a torch.Generator made for one use in one epoch: nothing has to remember its state."""
    return torch.Generator(device).manual_seed(seed_for(seed, stream, *more))


# ---- EMA --------------------------------------------------------------------------------------

def make_average(model):
    """Return the average at its start: a float32 copy of the model that takes no gradient."""
    return copy.deepcopy(model).float().requires_grad_(False)


@torch.no_grad()
def ema_update_(average, model, decay):
    """average ← decay·average + (1−decay)·model, in place, for two modules of one architecture.

    Parameters and float buffers (BatchNorm's running mean and variance) are averaged, integer
    buffers copied. decay is taken as given: 0 copies, 1 would freeze. Tarvainen & Valpola 2017,
    arXiv 1703.01780, section 2.
    """
    mine, theirs = [], []
    for a, t in zip((*average.parameters(), *average.buffers()),
                    (*model.parameters(), *model.buffers()), strict=True):
        if a.is_floating_point():
            mine.append(a)
            theirs.append(t.to(a.dtype))
        else:
            a.copy_(t)
    torch._foreach_lerp_(mine, theirs, 1 - decay)       # one call for all of them


def ema_decay(decay, update):
    """Return the decay at update 0, 1, …: low at first, to forget random weights; 0 before that."""
    return min(decay, (1 + update) / (10 + update)) if update >= 0 else 0.0


def ema_reached(decay):
    """Return the first update at which the warm-up no longer holds the decay back."""
    return max(0, math.ceil((10 * decay - 1) / (1 - decay) - 1e-6))


# ---- evaluate ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, precision="fp32", kept=None):
    """Return {"loss": mean cross-entropy, "accuracy": 0 to 1, "n": rows} over labelled rows.

    batches: any iterable of items that begin (x, y), of any sizes: everything is a sum over rows,
    divided by n at the end. The model is in eval mode inside; every module gets its mode back.
    kept: a list that takes each batch's logits.
    """
    device = next((p.device for p in model.parameters()), None)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    losses, hits, rows = [], [], []
    try:
        for x, y, *_ in batches:
            x, y = x.to(device or x.device), y.to(device or x.device)
            with autocast(x.device, precision):
                logits = model(x)                                       # (B, classes)
            if kept is not None:
                kept.append(logits.float())
            losses.append(F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="sum"))
            hits.append((logits.argmax(1) == y).sum())      # an unlabelled -1 is never hit
            rows.append((y >= 0).sum())
    finally:
        for module, training in modes:
            module.training = training
    # The first look at a value: no wait inside the loop.
    sums = torch.tensor([torch.stack(lot).cpu().double().sum() if lot else 0
                         for lot in (losses, hits, rows)], dtype=torch.float64)
    loss, right, n = summed(sums).tolist()
    if n == 0:
        raise ValueError("evaluate: no labelled rows in these batches")
    return {"loss": loss / n, "accuracy": right / n, "n": int(n)}


# ---- fit --------------------------------------------------------------------------------------

def schedule(kind, step, steps):
    """Return the factor on the learning rate at step 0 … steps−1.

    onecycle: from 1/25 up to 1 over the first 30 %, then down to nearly 0, both as half a cosine
    (Smith & Topin 2017, arXiv 1708.07120; the numbers are torch's).
    """
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    peak, last = 0.3 * steps - 1, steps - 1
    low, t = (0.04, step / peak) if step <= peak else (4e-6, (last - step) / (last - peak))
    return low + (1 - low) * (1 - math.cos(math.pi * t)) / 2


def make_optimizer(model, args):
    """Return the optimizer; biases and norms are not decayed."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    options = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)      # in one pass
    if args.optimizer == "sgd":     # fused, it takes no parameter that joins the others later
        options["fused"] = not runs.frozen_for(args)
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer](groups, **options)


def set_training(model, args, epoch):
    """Put the model into training mode; with --freeze features, all but those until
    --unfreeze-at: they take no gradient, and BatchNorm in them keeps its statistics."""
    frozen = epoch <= runs.frozen_for(args)
    model.train()
    if "freeze" in vars(args):
        model.features.train(not frozen).requires_grad_(not frozen)


def train_epoch(args, model, average, loss_fn, optimizer, batches, update, total, bar):
    """One pass over the batches, from update number `update` of `total`.

    Returns each step's loss, hits, labelled rows and norms of the layers' gradients, on the device:
    a look at a value would make a GPU finish all work under way. On a CPU it is free.
    """
    losses, hits, rows, norms, together = [], [], [], [], world() > 1
    # Averages the gradients of all processes during backward; made anew for what is frozen now.
    network = DistributedDataParallel(model, broadcast_buffers=False) if together else model
    warm = vars(args).get("warm_start", 0) * (total // args.epochs)
    for update, batch in enumerate(batches, update):        # noqa: B020
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(args.schedule, update, total)

        # forward and loss
        with autocast(batch.x.device, args.precision):
            loss, logits = loss_fn(network, batch)          # scalar, (B, classes)

        # backward
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        # step
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(torch._foreach_norm(gradients)))       # one a layer
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.clip,
                                                 torch.linalg.vector_norm(norms[-1]))
        optimizer.step()

        # EMA
        device.share_buffers_(model)
        if average is not None:
            ema_update_(average, model, ema_decay(args.ema_decay, update - warm))

        # log
        losses.append(loss.detach().float())
        hits.append((logits.detach().argmax(1) == batch.y).sum())
        rows.append((batch.y >= 0).sum())
        bar.update()
        if loss.device.type == "cpu" and not together and not torch.isfinite(loss):
            break
    losses, hits, rows = (summed(torch.stack(lot)) for lot in (losses, hits, rows))
    return losses / world(), hits, rows, torch.stack(norms)


def stop_unless_finite(args, values, norms, model, epoch, steps, folder, what="loss"):
    """End with exit code 3 at the first value that is not finite, naming epoch, step, learning rate
    and the layer whose gradient was largest in the last step before it, or failing that in it.
    values: the loss of each step; or one, of `what`, after the last."""
    wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if wrong is None:
        return
    layers = [name for name, p in model.named_parameters() if p.grad is not None]
    at, before = (wrong, norms[max(0, wrong - 1)]) if what == "loss" else (steps - 1, norms[-1])
    lr = args.lr * schedule(args.schedule, (epoch - 1) * steps + at, args.epochs * steps)
    largest = before.nan_to_num(nan=math.inf).argmax().item()
    kept = f"the state after epoch {epoch - 1} is kept" if epoch > 1 else "nothing is saved"
    fail(f"the {what} is {values[wrong]} at epoch {epoch}, step {at + 1}, learning rate "
         f"{lr:.2g}; the largest gradient before was that of {layers[largest]}, norm "
         f"{before[largest]:.2g}; {kept} in {folder}; {runs.calmer(args)}", code=3)


def fit(args, folder, model, loss_fn, splits, card, facts, average=None, draw=None):
    """Train a model for args.epochs epochs, or those that are left; return the run's final dict.

    loss_fn(model, batch) -> (loss, logits) says what is learned from a batch. splits: data.Batches
    of train, val (may be empty) and test. average: of make_average, updated and evaluated beside
    the model. card: what best.pt must hold to be used alone. facts: what final.json says beside
    results, with setup_seconds and teacher_seconds. draw(history, path, objective): curves.png.
    """
    train, val, test = splits
    optimizer = make_optimizer(model, args)
    limit = runs.chance((val if len(val) else test).labels.cpu())
    networks = {"model": model} | ({} if average is None else {"ema": average})
    history, best = restore(args, folder, card, networks, optimizer, len(val)) if (
        args.resume) else ([], {})
    if history and rank() == 0:
        save_best(folder, card, history, best)
        runs.write_history(folder / "metrics.csv", history)
    steps, first = train.steps(), len(history) + 1
    bar = tqdm(total=args.epochs * steps, initial=len(history) * steps, desc=folder.name,
               unit=" steps", dynamic_ncols=True, leave=False, disable=silent())
    for epoch in range(first, args.epochs + 1):
        started = time.perf_counter()
        set_training(model, args, epoch)
        batches = train.epoch(epoch)
        if epoch == first:
            batches = tell_time(batches, (args.epochs - epoch + 1) * steps)
        losses, hits, rows, norms = train_epoch(args, model, average, loss_fn, optimizer, batches,
                                                (epoch - 1) * steps, args.epochs * steps, bar)
        losses, hits, rows = losses.tolist(), int(hits.sum()), int(rows.sum())
        trained, lr = time.perf_counter() - started, optimizer.param_groups[0]["lr"]
        stop_unless_finite(args, losses, norms, model, epoch, steps, folder)

        row = dict(epoch=epoch, train_loss=sum(losses) / steps, train_accuracy=hits / max(1, rows))
        for name, column in runs.VALIDATED.items():
            known = name in networks and len(val)
            found = evaluate(networks[name], val, args.precision) if known else {}
            row |= {f"{column}_{key}": found.get(key) for key in ("loss", "accuracy")}
        size = sum(p.detach().float().norm() for p in model.parameters()).item()
        spoiled = float(sum((b - b).sum() for b in model.buffers()))     # what is finite is 0 here
        for what, value in (("norm of the weights", size), ("running variance", spoiled),
                            ("validation loss", row["val_loss"]),
                            ("average's validation loss", row["ema_val_loss"])):
            stop_unless_finite(args, [value or 0.0], norms, model, epoch, steps, folder, what)
        row |= dict(lr=lr, seconds=time.perf_counter() - started,
                    images_per_second=steps * train.step_size / trained)
        history.append(row)
        for name, network in networks.items():
            if runs.best_epoch(history, name) == epoch:
                best[name] = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
        if rank() == 0:
            save_epoch(folder, card, history, best, networks, optimizer)
        say(runs.epoch_line(row, args.epochs))
        warning = runs.learned_nothing(history, args.epochs, limit, len(card["classes"]))
        if warning:
            say(warning)
    bar.close()
    final = score(args, folder, networks, best, history, splits, facts, limit)
    if rank() == 0:
        if draw:
            draw(history, folder / "curves.png", objective=vars(args).get("objective"))
        runs.write_final(folder, final)
    return final


# ---- files of a run ---------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Write tensors and plain values so that the file is as it was or whole."""
    memory = io.BytesIO()
    torch.save(state, memory)
    write_whole(Path(path), memory.getbuffer())


def load_checkpoint(path):
    """Return what save_checkpoint wrote, on the CPU; no code in the file is ever run."""
    if wrong := damage(Path(path)):
        fail(f"{path}: {wrong}")
    try:
        return cards.read(path)
    except Exception as error:    # torch raises many kinds for foreign files
        fail(f"{path}: {cards.unread(error)}")


def save_best(folder, card, history, best):
    """Write best.pt; where a run is resumed, it may be of an epoch that was not finished."""
    epochs = {name: runs.best_epoch(history, name) for name in best}
    save_checkpoint(folder / "best.pt", card | dict(
        model=best["model"], ema=best.get("ema"), epoch=epochs["model"],
        ema_epoch=epochs.get("ema")))


def save_epoch(folder, card, history, best, networks, optimizer):
    """Write best.pt, metrics.csv, checkpoint.pt in this order: the last is the commit point."""
    if any(runs.best_epoch(history, name) == len(history) for name in networks):
        save_best(folder, card, history, best)
    runs.write_history(folder / "metrics.csv", history)
    states = {name: network.state_dict() for name, network in networks.items()}
    save_checkpoint(folder / "checkpoint.pt", dict(
        schema=runs.SCHEMA, settings=card["settings"], history=history, networks=states,
        best=best, optimizer=optimizer.state_dict()))


def restore(args, folder, card, networks, optimizer, validated):
    """Load the last finished epoch, if there is one; return its history and the best weights."""
    if not (path := folder / "checkpoint.pt").exists():
        return [], {}
    state = load_checkpoint(path)
    if isinstance(state, dict) and "best" not in state:         # an older run's
        state["best"] = load_checkpoint(folder / "best.pt")
    wrong = cards.unsound(state, card["settings"], networks, optimizer, args, validated)
    if wrong:
        fail(f"{path}: {wrong}; put the right one there, or add --overwrite to start again")
    for name, network in networks.items():
        network.load_state_dict(state["networks"][name])
    groups = optimizer.state_dict()["param_groups"]             # the flags', not the file's
    optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
    say(f"going on after epoch {len(state['history'])}")
    return state["history"], {name: dict(state["best"][name]) for name in networks}


def score(args, folder, networks, best, history, splits, facts, limit):
    """Score the test split, once, with the last and the best weights; return the final dict."""
    started, (train, val, test) = time.perf_counter(), splits
    first = {name: runs.best_epoch(history, name) for name in networks}
    known = {name: history[first[name] - 1][runs.VALIDATED[name] + "_accuracy"] for name in first}
    last, tested, kept = {}, {"ema": {}, "recomputed": {}}, {}
    for name, network in networks.items():
        tested[name] = last[name] = evaluate(network, test, args.precision, logits := [])
        if first[name] < len(history):
            network.load_state_dict(best[name])
            tested[name] = evaluate(network, test, args.precision, logits := [])
        kept[name] = logits
    if world() == 1:        # of several processes each has seen a part
        kept = {name: torch.cat(logits).cpu() for name, logits in kept.items()}
        runs.write_outputs(folder / "test.npz", kept, test.labels.cpu())
    average = networks.get("ema")
    if average is not None and args.norm == "batch":    # averaged weights have others
        with autocast(train.device, args.precision):
            torch.optim.swa_utils.update_bn(train.epoch(args.epochs), average)
        device.share_buffers_(average)
        tested["recomputed"] = evaluate(average, test, args.precision)
        if len(val):
            known["recomputed"] = evaluate(average, val, args.precision)["accuracy"]
    for name, found in tested.items():
        if found and not math.isfinite(found["loss"]):
            fail(f"{folder}: the loss of the {name} on test is {found['loss']}; "
                 f"{runs.calmer(args)}", code=3)
    right, speeds = tested["model"]["accuracy"], [row["images_per_second"] for row in history]
    seconds = (facts["setup_seconds"] + (facts["teacher_seconds"] or 0)
               + sum(row["seconds"] for row in history) + time.perf_counter() - started)
    final = dict(
        schema=runs.SCHEMA, recipe=args.recipe, run=folder.name, **facts, seed=args.seed,
        arch=args.arch, epochs=args.epochs, best_epoch=first["model"], test_accuracy=right,
        ema_best_epoch=first.get("ema"), val_accuracy=known["model"],
        test_loss=tested["model"]["loss"], last_test_accuracy=last["model"]["accuracy"],
        ema_val_accuracy=known.get("ema"), ema_test_accuracy=tested["ema"].get("accuracy"),
        ema_last_test_accuracy=last.get("ema", {}).get("accuracy"),
        recomputed_val_accuracy=known.get("recomputed"),
        recomputed_test_accuracy=tested["recomputed"].get("accuracy"),
        learned=(right if known["model"] is None else known["model"]) > limit, seconds=seconds,
        images_per_second=float(np.median(speeds[1:] or speeds)),
        peak_memory_bytes=device.peak_memory(), device=args.device, precision=args.precision,
        torch=torch.__version__,
        weights_sha256=cards.weights_sha256(networks["model"].state_dict()))
    shown = f"{folder.name}: test {100 * right:.2f} % (epoch {first['model']}/{args.epochs})"
    for name, title in (("ema", "average"), ("recomputed", "its statistics recomputed")):
        if tested[name]:
            shown += f", {title} {100 * tested[name]['accuracy']:.2f} % (epoch {first['ema']})"
    say(f"{shown}, {seconds:.0f} s")
    if not final["learned"]:
        say("warning: this network learned nothing; no report draws a conclusion from it")
    return final


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--recipes", action="store_true", required=True, help="print the recipes")
    parser.parse_args(argv)
    print(f"{recipes_table()}\n\n{same_in_all()}")
    return RECIPES


if __name__ == "__main__":
    launch(main)
