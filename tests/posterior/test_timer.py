"""Interrupts by a timer, which come when Python asks for them."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import random, signal, sys, time, warnings
warnings.simplefilter("ignore")
from tests.faults import differences, leftovers, same, snapshot
from tests.posterior.test_faults import (
    CHANGES, MEASUREMENTS, PREDICTIONS, fitted, network, state_of,
)

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
la, model = fitted("all"), network(training=False)
calls = {name: lambda call=call: call(la) for name, call in PREDICTIONS.items()}
calls |= {name: lambda call=call: call(model) for name, call in MEASUREMENTS.items()}
del calls["derivatives"]  # torch turns interrupts in forward mode into its own errors
calls |= {name: lambda call=CHANGES[name]: call(la) for name in ("fit", "gridsearch")}
calls["state"] = la.state_dict
times, after = {}, {}
for name, call in calls.items():
    call()
    la = fitted("all")
    start = time.perf_counter()
    call()
    times[name] = time.perf_counter() - start
    after[name] = la.state_dict()
la = fitted("all")
before, of_model = snapshot(la.model), snapshot(model)
posterior, clean, count, end = state_of(la), leftovers(), 0, time.perf_counter() + 6
while time.perf_counter() < end:
    name = random.choice(list(calls))
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-5, random.random() * times[name]))
        calls[name]()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        count += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    is_made = name in ("fit", "gridsearch") and same(la.state_dict(), after[name])
    found = differences(la.model, before)
    assert not found or (is_made and found == ["modes"]), (name, found)
    assert is_made or same(state_of(la), posterior), name
    if is_made:
        la = fitted("all")
        before, posterior = snapshot(la.model), state_of(la)
    assert not differences(model, of_model), (name, differences(model, of_model))
    assert leftovers() == clean, (name, leftovers())
print(count)
"""


def test_timer_interrupts_change_nothing():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
