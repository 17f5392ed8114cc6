from itertools import accumulate
from operator import mul

import numpy as np
import pytest

from tilewright.runtime.errors import UsageError
from tilewright.runtime.plan.schedules import SCHEDULES, ddim, ddpm, flow_shift

SDXL = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "spacing_offset": 1, "final_alpha": "first"}
TOKSR = {"betas": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "spacing_offset": 0, "final_alpha": "one"}
DIFFUSION = [pytest.param(30, SDXL, id="sdxl"), pytest.param(25, TOKSR, id="toksr")]
DIFFUSERS = "the reference schedules are diffusers'"


def mu_of(tokens):
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def assert_rounded_once(tables, count):
    for name, table in tables.items():
        assert table.dtype == np.float32, name
        assert table.shape == (count,), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_float32_tables_of_one_row_a_step(name):
    tables = SCHEDULES[name](12, 1024, **({} if name == "flow_shift" else SDXL))
    assert_rounded_once(tables, 12)


# --- flow_shift


@pytest.mark.parametrize(
    ("count", "tokens", "first", "last"),
    [
        (28, 1024, (1, 0.9807, 0.9606), (0.1839, 0.1262, 0.0650)),
        (28, 4096, (1, 0.9884, 0.9762), (0.2748, 0.1955, 0.1047)),
        (28, 9216, (1, 0.9951, 0.9899), (0.4741, 0.3663, 0.2177)),
        (28, 14400, (1, 0.9980, 0.9958), (0.6844, 0.5816, 0.4009)),
        (30, 2048, (1,), (0.1988, 0.1376, 0.0715)),
        (30, 8192, (1,), (0.4124, 0.3109, 0.1789)),
    ],
)
def test_flow_sigmas_are_the_specifications_numbers(count, tokens, first, last):
    sigma = flow_shift(count, tokens)["sigma"]
    np.testing.assert_allclose(sigma[: len(first)], first, atol=5.1e-5)  # printed with four decimals
    np.testing.assert_allclose(sigma[-len(last) :], last, atol=5.1e-5)


def test_flow_shift_starts_at_pure_noise_and_ends_at_the_image():
    tables = flow_shift(28, 4096)
    assert tables["sigma"][0] == 1
    assert tables["sigma_next"][-1] == 0
    np.testing.assert_array_equal(tables["sigma_next"][:-1], tables["sigma"][1:])


def test_flow_shift_of_one_step_goes_from_noise_to_image_at_once():
    tables = flow_shift(1, 1024)
    assert (tables["sigma"].tolist(), tables["sigma_next"].tolist()) == ([1.0], [0.0])


def test_max_mu_caps_large_canvases_and_leaves_small_ones():
    np.testing.assert_array_equal(flow_shift(28, 14400, max_mu=1.15)["sigma"], flow_shift(28, 4096)["sigma"])
    np.testing.assert_array_equal(flow_shift(28, 1024, max_mu=1.15)["sigma"], flow_shift(28, 1024)["sigma"])


def test_min_mu_holds_small_canvases_up_and_leaves_large_ones():
    np.testing.assert_allclose(flow_shift(28, 16, min_mu=0.5)["sigma"], flow_shift(28, 256)["sigma"])
    np.testing.assert_array_equal(flow_shift(28, 1024, min_mu=0.5)["sigma"], flow_shift(28, 1024)["sigma"])


LINES = [(0.5, 1.15, 256, 4096), (5.0, 5.0, 1, 2), (1.0, -0.25, 100, 900)]  # base and largest shift, and their tokens


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("tokens", [16, 500, 14400])
def test_flow_shift_takes_the_line_of_a_schedulers_configuration(line, tokens):
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    base_shift, max_shift, base_tokens, max_tokens = line
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = calculate_shift(tokens, base_tokens, max_tokens, base_shift, max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9), mu=mu)
    options = {"base_shift": base_shift, "max_shift": max_shift, "base_tokens": base_tokens, "max_tokens": max_tokens}
    tables = flow_shift(9, tokens, **options)
    np.testing.assert_allclose(np.append(tables["sigma"], tables["sigma_next"][-1]), scheduler.sigmas, atol=1e-6)


def test_flow_shifts_defaults_are_the_published_line():
    published = {"base_shift": 0.5, "max_shift": 1.15, "base_tokens": 256, "max_tokens": 4096}
    np.testing.assert_array_equal(flow_shift(28, 1234)["sigma"], flow_shift(28, 1234, **published)["sigma"])


@pytest.mark.parametrize("count", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 14400])
def test_flow_shift_agrees_with_diffusers(count, tokens):
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=mu_of(tokens))
    tables = flow_shift(count, tokens)
    np.testing.assert_allclose(np.append(tables["sigma"], tables["sigma_next"][-1]), scheduler.sigmas, atol=1e-6)


def test_an_euler_trajectory_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    torch = pytest.importorskip("torch", reason=DIFFUSERS)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=mu_of(4096))
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    theirs, ours, tables = noise, noise.numpy().astype(np.float64), flow_shift(28, 4096)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(0.8 * theirs - 0.1, t, theirs).prev_sample
        ours = ours + (tables["sigma_next"][i] - tables["sigma"][i]) * (0.8 * ours - 0.1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


# --- ddim and ddpm


def test_sdxls_thirty_steps_start_at_958_and_end_at_1():
    tables = ddim(30, 0, **SDXL)
    assert tables["t"].tolist() == [958 - 33 * i for i in range(30)]
    assert tables["t"].tolist()[-2:] == [34, 1]
    np.testing.assert_allclose([tables["alpha"][0], tables["beta"][0]], [0.086803, 0.996226], atol=5.1e-7)
    np.testing.assert_allclose([tables["alpha"][-1], tables["beta"][-1]], [0.999148, 0.041279], atol=5.1e-7)
    assert tables["alpha_next"][-1] ** 2 == pytest.approx(0.99915, abs=5.1e-6)


def test_toksrs_twenty_five_steps_end_at_0_and_at_the_clean_image():
    tables = ddim(25, 0, **TOKSR)
    assert tables["t"].tolist() == [960 - 40 * i for i in range(25)]
    assert (tables["alpha_next"][-1], tables["beta_next"][-1]) == (1, 0)


def test_each_ddim_step_ends_where_the_next_begins():
    tables = ddim(30, 0, **SDXL)
    np.testing.assert_array_equal(tables["alpha_next"][:-1], tables["alpha"][1:])
    np.testing.assert_array_equal(tables["beta_next"][:-1], tables["beta"][1:])


@pytest.mark.parametrize(("count", "options"), DIFFUSION)
def test_ddpm_walks_the_levels_of_ddim_and_ends_on_x0_without_noise(count, options):
    walk, reference = ddpm(count, 0, **options), ddim(count, 0, **options)
    for name in ("t", "alpha", "beta"):
        np.testing.assert_array_equal(walk[name], reference[name])
    assert (walk["x0_weight"][-1], walk["z_weight"][-1], walk["noise_weight"][-1]) == (1, 0, 0)


def test_ddpm_takes_final_alpha_and_ends_the_same():
    for name, table in ddpm(30, 0, **SDXL).items():
        np.testing.assert_array_equal(table, ddpm(30, 0, **SDXL | {"final_alpha": "one"})[name])


@pytest.mark.parametrize(("count", "options"), DIFFUSION)
def test_a_ddpm_step_keeps_the_noise_level_of_the_next_timestep(count, options):
    """With exact predictions, mean and variance of z' are those of the forward process one step earlier."""
    tables = {name: table.astype(np.float64) for name, table in ddpm(count, 0, **options).items()}
    mean = tables["x0_weight"] + tables["z_weight"] * tables["alpha"]
    variance = (tables["z_weight"] * tables["beta"]) ** 2 + tables["noise_weight"] ** 2
    np.testing.assert_allclose(mean, np.append(tables["alpha"][1:], 1), atol=1e-6)
    np.testing.assert_allclose(variance, np.append(tables["beta"][1:] ** 2, 0), atol=1e-6)


def alpha_bars(options):
    """The products of 1 - beta, one training step at a time in Python's float64."""
    power = {"linear": 1, "scaled_linear": 2}[options["betas"]]
    start, end = options["beta_start"] ** (1 / power), options["beta_end"] ** (1 / power)
    return list(accumulate((1 - (start + (end - start) * i / 999) ** power for i in range(1000)), mul))


@pytest.mark.parametrize(("count", "options"), DIFFUSION)
def test_levels_are_rounded_to_float32_only_at_the_end(count, options):
    tables = ddim(count, 0, **options)
    bar = np.array(alpha_bars(options))[tables["t"].astype(int)]
    np.testing.assert_array_max_ulp(tables["alpha"], np.sqrt(bar).astype(np.float32), maxulp=1)
    np.testing.assert_array_max_ulp(tables["beta"], np.sqrt(1 - bar).astype(np.float32), maxulp=1)


def diffusers_scheduler(name, options, count):
    """diffusers' scheduler on alpha-bars in float64: its own float32 product moves a trajectory by up to 2e-6."""
    diffusers = pytest.importorskip("diffusers", reason=DIFFUSERS)
    torch = pytest.importorskip("torch", reason=DIFFUSERS)
    own = {"set_alpha_to_one": options["final_alpha"] == "one"} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(
        beta_schedule=options["betas"],
        beta_start=options["beta_start"],
        beta_end=options["beta_end"],
        steps_offset=options["spacing_offset"],
        timestep_spacing="leading",
        clip_sample=False,
        **own,
    )
    scheduler.set_timesteps(count)
    exact = torch.tensor(alpha_bars(options), dtype=torch.float64)
    np.testing.assert_allclose(scheduler.alphas_cumprod, exact, atol=1e-6)
    scheduler.alphas_cumprod = exact
    if own == {"set_alpha_to_one": False}:
        scheduler.final_alpha_cumprod = exact[0]
    return scheduler


def toy_eps(z, t):
    return 0.9 * z - 0.2 + 1e-4 * t


@pytest.mark.parametrize(
    ("count", "options"), [*DIFFUSION, pytest.param(999, SDXL | {"final_alpha": "one"}, id="ends-at-step-0")]
)
def test_a_ddim_trajectory_agrees_with_diffusers(count, options):
    torch = pytest.importorskip("torch", reason=DIFFUSERS)
    scheduler, tables = diffusers_scheduler("DDIMScheduler", options, count), ddim(count, 0, **options)
    np.testing.assert_array_equal(tables["t"], scheduler.timesteps.numpy())
    theirs = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = theirs.numpy()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_eps(theirs, int(t)), int(t), theirs).prev_sample
        alpha, beta, alpha_next, beta_next = (float(tables[k][i]) for k in ("alpha", "beta", "alpha_next", "beta_next"))
        eps = toy_eps(ours, int(t))
        ours = alpha_next * (ours - beta * eps) / alpha + beta_next * eps
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize(("count", "options"), DIFFUSION)
def test_a_ddpm_trajectory_agrees_with_diffusers_on_the_same_noise(count, options):
    torch = pytest.importorskip("torch", reason=DIFFUSERS)
    scheduler, tables = diffusers_scheduler("DDPMScheduler", options, count), ddpm(count, 0, **options)
    np.testing.assert_array_equal(tables["t"], scheduler.timesteps.numpy())
    theirs = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = theirs.numpy()
    draw, replay = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_eps(theirs, int(t)), int(t), theirs, generator=draw).prev_sample
        row = {name: float(table[i]) for name, table in tables.items()}
        noise = torch.randn(1, 64, dtype=torch.float64, generator=replay).numpy()
        x0 = (ours - row["beta"] * toy_eps(ours, int(t))) / row["alpha"]
        ours = row["x0_weight"] * x0 + row["z_weight"] * ours + row["noise_weight"] * noise
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


# --- what is refused


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_without_steps_is_refused(name):
    with pytest.raises(UsageError, match="count=0 is no number of steps; use 1"):
        SCHEDULES[name](0, 1024, **({} if name == "flow_shift" else SDXL))


def test_flow_shift_without_tokens_is_refused():
    with pytest.raises(UsageError, match="tokens=0 is no token count; use 1 or more"):
        flow_shift(28, 0)


@pytest.mark.parametrize("ends", [(0, 4096), (4096, 256), (256, 256)])
def test_a_flow_shift_without_a_line_is_refused(ends):
    with pytest.raises(UsageError, match=f"base_tokens={ends[0]}, max_tokens={ends[1]} give no line; use 0 < base"):
        flow_shift(28, 1024, base_tokens=ends[0], max_tokens=ends[1])


@pytest.mark.parametrize("options", [{"min_mu": 1e3}, {"max_mu": -1e3}, {"base_shift": 1e308, "max_shift": -1e308}])
def test_a_flow_shift_beyond_all_numbers_is_refused(options):
    with pytest.raises(UsageError, match="leaves no steps; bound it between -100 and 100"):
        flow_shift(28, 1024, **options)


@pytest.mark.parametrize("schedule", [ddim, ddpm])
@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (1001, {}, "count=1001 is no number of steps; use 1 to 1000"),
        (30, {"betas": "cosine"}, "betas='cosine' is not one of linear, scaled_linear"),
        (30, {"final_alpha": "zero"}, "final_alpha='zero' is not one of first, one"),
        (30, {"beta_end": 1.5}, "beta_start=0.00085, beta_end=1.5 is no noise schedule; use 0 < beta_start"),
        (30, {"spacing_offset": -1}, "spacing_offset=-1 with 30 steps leaves the schedule; use 0 to 42"),
        (1000, {}, "spacing_offset=1 with 1000 steps leaves the schedule; use 0 to 0"),
    ],
)
def test_options_outside_the_schedule_are_refused(schedule, count, change, message):
    with pytest.raises(UsageError, match=message):
        schedule(count, 0, **SDXL | change)
