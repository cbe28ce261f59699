import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.train.guards import Guards, Health, Notice, Profile, Watchdog
from ar_jax.train.state import create, make_update

GOOD = {"skipped_in_a_row": 0.0, "loss": 1.0}


def bad(in_a_row):
    return {"skipped_in_a_row": float(in_a_row), "loss": float("nan"), "grad_norm": float("inf")}


# updates that are not finite


def gradients(params, extra, frozen, batch, key, step):
    """Known gradients; the batch says what goes wrong."""
    grads = {"model": {"kernel": batch["model"]}, "discriminator": {"kernel": batch["discriminator"]}}
    return grads, {"seen": extra["seen"] + 1}, {"loss": batch["loss"]}


def trained(*batches):
    """A state after updates with everything in it: two networks, momentum, average, statistics, a last change."""
    tx = optax.sgd(0.5, momentum=0.9)
    params = {"model": {"kernel": jnp.zeros(3)}, "discriminator": {"kernel": jnp.zeros(2)}}
    after = lambda state, key: state.replace(extra={"seen": state.extra["seen"] * 2})  # noqa: E731
    update = jax.jit(make_update(gradients, tx, ema=0.9, after=after))
    state, seen = create(params, {"seen": jnp.int32(1)}, tx, 0.9), []
    for i, batch in enumerate(batches):
        state, metrics = update(state, {}, batch, jax.random.key(i))
        seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def batch(**changes):
    numbers = {"model": jnp.ones(3), "discriminator": jnp.ones(2), "loss": jnp.float32(1)}
    return numbers | {name: jnp.asarray(value, jnp.float32) for name, value in changes.items()}


@pytest.mark.parametrize(
    "wrong",
    [{"loss": np.nan}, {"loss": np.inf}, {"model": [1, np.nan, 1]}, {"model": [1e30] * 3}, {"discriminator": [np.inf, 0]}],
    ids=["loss nan", "loss infinite", "gradient nan", "norm overflows", "the other network's gradient"],
)  # fmt: skip
def test_an_update_that_is_not_finite_changes_nothing_but_the_counts(wrong):
    state, _ = trained(batch(), batch())
    skipped, metrics = trained(batch(), batch(), batch(**wrong))
    assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (3, 1, 1)
    assert (metrics[-1]["skipped"], metrics[-1]["skipped_in_a_row"]) == (1, 1)
    rest = [x.replace(step=0, skipped=0, skipped_in_a_row=0) for x in (state, skipped)]
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_a_good_update_after_skipped_ones_is_the_one_they_did_not_make():
    nan = batch(loss=np.nan)
    plain, _ = trained(batch(), batch(model=[1, 2, 3]))
    state, metrics = trained(batch(), nan, nan, batch(model=[1, 2, 3]))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    assert [m["skipped_in_a_row"] for m in metrics] == [0, 1, 2, 0]
    for name in ("params", "ema", "opt", "extra"):
        jax.tree.map(np.testing.assert_array_equal, getattr(plain, name), getattr(state, name))
    assert float(jnp.abs(plain.params["model"]["kernel"]).min()) > 0.5


def test_too_many_skipped_updates_in_a_row_stop_with_a_report_of_the_first():
    health = Health(Guards(skipped=3))
    assert health.check(1, GOOD) == ("", {})
    message, figures = health.check(2, bad(1))
    assert message == "skipped, 1 in a row: skipped_in_a_row 1, loss nan, grad_norm inf"
    assert figures["grad_norm"] == float("inf")
    health.check(3, bad(2))
    health.check(4, GOOD)
    health.check(5, bad(1) | {"grad_norm": 7.5})
    health.check(6, bad(2))
    with pytest.raises(ValueError, match=r"neither of updates 5 to 7 .* first of them, 5: .*loss nan, grad_norm 7.5"):
        health.check(7, bad(3))


def test_a_row_that_began_before_a_restart_still_stops():
    with pytest.raises(ValueError, match=r"neither of updates 8 to 10 .* 8: before this process began"):
        Health(Guards(skipped=3)).check(10, bad(3))


def test_zero_never_stops():
    health = Health(Guards(skipped=0))
    for i in range(1, 200):
        health.check(i, bad(i))


# spikes


def losses(count, seed=0):
    return 2 + 0.1 * np.random.default_rng(seed).normal(size=count)


def spikes(values, **guards):
    health = Health(Guards(**guards))
    return {i: found for i, loss in enumerate(values) if (found := health.check(i, GOOD | {"loss": loss})[1])}


def test_a_loss_far_above_its_running_mean_is_reported_with_its_figures():
    values = losses(300)
    values[200] = 4
    found = spikes(values)
    assert list(found) == [200]
    assert found[200] == {
        "spike/loss": 4.0, "spike/mean": pytest.approx(2, abs=0.05), "spike/deviation": pytest.approx(0.1, abs=0.03),
    }  # fmt: skip
    assert list(spikes(values, spike=100.0)) == []
    assert list(spikes(values, spike=0.0)) == []


def test_running_moments_are_plain_ones_at_first():
    health, values = Health(Guards()), losses(40)
    for i, loss in enumerate(values):
        health.check(i, GOOD | {"loss": loss})
    assert health._mean == pytest.approx(values.mean())
    assert health._variance == pytest.approx(values.var())


def test_neither_a_falling_loss_nor_the_first_updates_are_spikes():
    assert spikes(10 * 0.98 ** np.arange(500)) == {}
    assert spikes([1.0, 100.0, 1.0, 50.0]) == {}


def test_a_spike_hides_neither_the_next_nor_is_a_lasting_rise_reported_for_ever():
    values = losses(1000)
    values[[200, 205]] = 5
    assert list(spikes(values)) == [200, 205]
    values = losses(1000)
    values[200:] += 2
    found = list(spikes(values))
    assert found[0] == 200
    assert found[-1] < 350


# notices and hangs


def test_sigterm_is_noticed_inside_and_means_what_it_did_outside():
    before = signal.getsignal(signal.SIGTERM)
    with Notice() as notice:
        assert not notice.received(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.received(2)
        assert notice.received(3)
    assert signal.getsignal(signal.SIGTERM) is before


TWICE = """
import os, signal, sys, time
from ar_jax.machine import distributed
from ar_jax.train.guards import Notice

with distributed.command("command"):
    if sys.argv[1] == "inside":
        with Notice() as notice:
            os.kill(os.getpid(), signal.SIGINT)
            assert notice.received(1) and notice.code == 130
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("where", "said"), [("inside", "Ctrl-C once more ends at once\n"), ("outside", "command: interrupted\n")]
)
def test_ctrl_c_ends_with_a_sentence_and_130(where, said):
    done = subprocess.run([sys.executable, "-c", TWICE, where], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr


HANG = """
import time
from ar_jax.train.guards import Watchdog

def the_step_that_hangs():
    time.sleep(1.2)

with Watchdog(0.5) as watchdog:
    for _ in range(8):
        watchdog.alive()
        time.sleep(0.1)
    print("busy", flush=True)
    watchdog.alive()
    the_step_that_hangs()
time.sleep(0.8)
"""


def test_a_hang_prints_every_stack_and_a_busy_training_none():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "busy\n"
    assert done.stderr.count("Timeout (0:00:00.500000)!") == 1
    assert "the_step_that_hangs" in done.stderr


def test_no_watchdog_without_a_limit(capfd):
    with Watchdog(0) as watchdog:
        watchdog.alive()
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("updates", [0, 2])
def test_a_profile_traces_the_updates_it_is_asked_for(tmp_path, updates, capsys):
    with Profile(tmp_path / "profile", updates) as profile:
        for _ in range(12):
            profile.updated(jnp.ones(3) * 2)
    assert bool(list(tmp_path.glob("profile/**/*.xplane.pb"))) == bool(updates)
    assert (f"profile of 2 updates in {tmp_path}" in capsys.readouterr().out) == bool(updates)


def test_a_profile_of_a_training_that_ends_early_is_still_written(tmp_path):
    with Profile(tmp_path, 100) as profile:
        for _ in range(12):
            profile.updated(jnp.ones(3) * 2)
    assert list(tmp_path.glob("**/*.xplane.pb"))
