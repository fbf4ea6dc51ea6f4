"""Diffusion: noise schedule, DDIM, DPM-Solver++ and classifier-free guidance.

    x_t = √ᾱ_t x0 + √(1 − ᾱ_t) eps

is a latent at timestep t. ᾱ (alphas_cumprod, for one timestep `abar`) falls from about 1, clean, to about 0, noise.
"""

import numpy as np
import torch

from common import UserError
from efficiency import with_cached_depth, with_context


class Schedule:
    """The noise levels a model was trained at, from the dictionary in its scheduler_config.json.

    Defaults are those of diffusers' DDIMScheduler. As in its pipeline, steps_offset is always 1 and clip_sample False.
    Raises UserError for unsupported options.
    """

    def __init__(self, config):
        from formats.checks import check_scheduler  # imported late, as the method does not need it
        check_scheduler(config)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        T = config.get("num_train_timesteps", 1000)
        power = {"linear": 1, "scaled_linear": 0.5}[config.get("beta_schedule", "linear")]
        betas = torch.linspace(start**power, end**power, T) ** (1 / power)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # (T,) float32, on the CPU
        self.final = torch.tensor(1.0) if config.get("set_alpha_to_one", True) else self.alphas_cumprod[0]
        self.prediction_type = config.get("prediction_type", "epsilon")
        self.config = config

    def min_snr_weight(self, t, gamma):
        """Weights (B,) of the errors at t (B,), on the CPU: min(SNR, γ) / SNR, SNR = ᾱ / (1 − ᾱ), arXiv 2303.09556.

        All are 1 if gamma is 0. For v-prediction it is divided by SNR + 1 in place of SNR.
        """
        abar = self.alphas_cumprod[t]
        snr = abar / (1 - abar)
        if not gamma:
            return torch.ones_like(snr)
        return snr.clamp(max=gamma) / (snr + (self.prediction_type == "v_prediction"))

    def timesteps(self, steps, sampler="ddim"):
        """The timesteps at which the UNet is evaluated: `steps` falling integers of 0 … T − 1.

        Spacings as in arXiv 2305.08891, table 2. Raises UserError if so many steps do not fit.
        """
        T = len(self.alphas_cumprod)
        spacing = self.config.get("timestep_spacing", "leading" if sampler == "ddim" else "linspace")
        points = steps + (sampler == "dpm")  # DPM-Solver++'s grid includes the clean end, without a UNet evaluation
        if not 1 <= steps <= T:
            t = []
        elif spacing == "leading":
            t = np.arange(points)[::-1] * (T // points) + 1
        elif spacing == "linspace":
            t = np.linspace(0, T - 1, points).round()[::-1]
        else:  # trailing
            t = np.arange(T, 0, -T / steps).round() - 1
        t = [int(i) for i in t[:steps]]
        if not t or len(set(t)) < steps or t[0] >= T:
            raise UserError(f"expected a number of steps that fits {T} timesteps ({sampler}, {spacing}), got {steps}")
        return t

    def trajectory(self, steps, sampler="ddim"):
        """The steps from noise to image: a list of (t, ᾱ at t, ᾱ after the step)."""
        t = self.timesteps(steps, sampler)
        abar = self.alphas_cumprod[t]  # (steps,)
        if sampler == "dpm":
            from formats.checks import SCHEDULER_DPM, check_scheduler
            check_scheduler(self.config, SCHEDULER_DPM)
            return list(zip(t, abar, [*abar[1:], torch.tensor(1.0)]))
        # diffusers subtracts a constant stride. That is not always the next t of the list (linspace spacing).
        after = [i - len(self.alphas_cumprod) // steps for i in t]
        return list(zip(t, abar, [self.alphas_cumprod[i] if i >= 0 else self.final for i in after]))


def x0_and_eps(output, x, abar, prediction_type):
    """The UNet's output at x_t -> predicted x0 and eps. v = √ᾱ eps − √(1−ᾱ) x0: arXiv 2202.00512, app. D."""
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    return (x - sigma * output) / alpha, output


def ddim_step(x0, eps, abar, abar_prev, eta=0.0, noise=None):
    """From ᾱ to ᾱ_prev, that of the cleaner timestep: DDIM, arXiv 2010.02502, eq. 12, with σ of eq. 16.

    eta: 0 is deterministic, 1 is DDPM. Above 0 it needs noise ~ N(0, 1) of the latents' shape.
    """
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    x = abar_prev.sqrt() * x0 + (1 - abar_prev - sigma**2).sqrt() * eps
    return x + sigma * noise if eta else x


def dpm_step(x0, x, abar, abar_prev, previous=None):
    """From ᾱ to ᾱ_prev, as in `ddim_step`: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.

    previous: (x0, ᾱ) of the step before, None at the first. With λ = log(√ᾱ / √(1−ᾱ)), linearly extrapolate x0 to
    the midpoint in λ (second-order multistep). Given that x0, the update is deterministic DDIM. The last step, to
    ᾱ_prev = 1, is infinitely long in λ and keeps x0.
    """
    if previous is not None and abar_prev < 1:
        x0_previous, abar_previous = previous
        h, h_previous = abar_prev.logit() - abar.logit(), abar.logit() - abar_previous.logit()  # in 2λ, which cancels
        x0 = x0 + h / 2 / h_previous * (x0 - x0_previous)
    eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    return ddim_step(x0, eps, abar, abar_prev)


def sample_noise(generators, shape, device="cpu"):
    """N(0, 1) float32, row i from CPU generator i: (B, *shape)."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(device)


@torch.no_grad()
def denoise(unet, schedule, latents, context, uncond=None, *, steps, guidance=7.5, sampler="ddim", eta=0.0,
            generators=None, deep_every=1):
    """Yield the latents (B, 4, h, w) float32 after each step, from noise to image.

    context, uncond: conditional and unconditional context, (B, L, C). guidance > 1 is classifier-free guidance,
        arXiv 2207.12598 (its w + 1); otherwise it is off and `uncond` unused.
    generators: one CPU generator a row, for the noise of eta > 0 (ddim only).
    deep_every: steps between evaluations of the UNet's lower resolutions (efficiency.with_cached_depth).
    """
    guided, dtype = guidance > 1, next(unet.parameters()).dtype
    context = (torch.cat([uncond, context]) if guided else context).to(dtype)  # (2B, L, C)
    model = with_context(unet, context, latents) if deep_every == 1 else with_cached_depth(unet, context, deep_every)
    trajectory = schedule.trajectory(steps, sampler)
    time_embs = unet.embed(torch.tensor([t for t, _, _ in trajectory], device=latents.device))  # (steps, 4C)
    x, previous = latents, None
    for time_emb, (_, abar, abar_prev) in zip(time_embs.split(1), trajectory):
        x_in = torch.cat([x, x]) if guided else x
        output = model(x_in.to(dtype), time_emb).float()
        if guided:
            out_uncond, out_cond = output.chunk(2)  # (B, 4, h, w) each
            output = out_uncond + guidance * (out_cond - out_uncond)
        x0, eps = x0_and_eps(output, x, abar, schedule.prediction_type)
        if sampler == "dpm":
            x, previous = dpm_step(x0, x, abar, abar_prev, previous), (x0, abar)
        else:
            noise = sample_noise(generators, x.shape[1:], x.device) if eta else None
            x = ddim_step(x0, eps, abar, abar_prev, eta, noise)
        yield x
