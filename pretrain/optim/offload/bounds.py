"""What no plan can beat, and the balance of both sides in closed form. Torch-free."""

from __future__ import annotations

from pretrain.optim.offload.constants import Constants, Widths, Window


def lower_bound(
    streamed: int,
    on_cpu: int,
    resident: int,
    constants: Constants,
    widths: Widths,
    window: Window,
    *,
    host_weights: bool = False,
    dram: float | None = None,
) -> float:
    """Seconds that a step is longer at least, by the elements updated at each place.

    Each direction of the link, the CPU and the device have to get through what is theirs; ``window`` hides what it can:
    state brought early, gradients sent early, state that flows back in the next forward pass. ``dram``: bytes/s of host
    memory; the CPU reads and writes state, gradient and weight, each transfer reads or writes once.
    """
    weight = 0 if host_weights else widths.weight
    gradient = 0 if host_weights else widths.gradient
    down_with_it = weight if widths.weight_down else 0
    state = streamed * widths.state
    early_state = min(state, window.device_bytes + window.early_bytes, window.backward_s * constants.h2d)
    early_gradients = min(on_cpu * gradient, window.backward_s * constants.d2h)
    link_up = max(constants.h2d, constants.h2d_duplex)
    link_down = max(constants.d2h, constants.d2h_duplex)
    times = [
        (state - early_state + on_cpu * weight) / link_up,
        (state + on_cpu * (gradient + down_with_it) - early_gradients) / link_down - window.forward_s,
        on_cpu / max(constants.cpu_adam, constants.cpu_adam_with_link),
        (streamed + resident) / constants.gpu_adam,
    ]
    if dram is not None:
        touched = 2 * state + on_cpu * 2 * (widths.state + gradient + weight)
        times.append(touched / dram - window.backward_s - window.forward_s)
    return max(0.0, *times)


def balanced_fraction(constants: Constants, widths: Widths) -> float:
    """Share of offloaded elements for the device when both sides take the same time, f* = t_c / (t_c + t_g).

    ``t_c`` = 1 / ``cpu_adam_with_link`` and ``t_g`` = ``widths.state`` / bandwidth of the slower direction with both
    busy: without overlap, gradients and weights on the link, and with the device's own update hidden by the transfers.
    """
    cpu_s = 1 / constants.cpu_adam_with_link
    link = min(constants.h2d_duplex, constants.d2h_duplex) * constants.link_with_cpu
    device_s = max(widths.state / link, 1 / constants.gpu_adam)
    return cpu_s / (cpu_s + device_s)


def estimated_fraction(
    elements: int, constants: Constants, widths: Widths, window: Window, *, host_weights: bool = False
) -> float:
    """Share of ``elements`` for the device at which :func:`lower_bound`, at the rates with all busy, is least."""
    busy = Constants(
        h2d=constants.h2d_duplex * constants.link_with_cpu,
        d2h=constants.d2h_duplex * constants.link_with_cpu,
        h2d_duplex=constants.h2d_duplex * constants.link_with_cpu,
        d2h_duplex=constants.d2h_duplex * constants.link_with_cpu,
        link_with_cpu=1.0,
        cpu_adam=constants.cpu_adam_with_link,
        cpu_adam_with_link=constants.cpu_adam_with_link,
        gpu_adam=constants.gpu_adam,
        latency=constants.latency,
    )

    def seconds(fraction: float) -> float:
        streamed = round(fraction * elements)
        return lower_bound(streamed, elements - streamed, 0, busy, widths, window, host_weights=host_weights)

    # A maximum of lines less constants is convex: thirds close in on its least point.
    low, high = 0.0, 1.0
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if seconds(left) <= seconds(right):
            high = right
        else:
            low = left
    return (low + high) / 2
