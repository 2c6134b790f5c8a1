"""What protects patients and sites: noise, and sums that show no single site."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmix.config.base import Count, OpenFraction, Positive, Section


class Privacy(Section):
    """Differential privacy (fedmix/privacy/): of patients (limits: dpsgd.py), or of whole sites (limits: updates.py)."""

    mode: Literal["none", "dp", "noisy_updates", "central_noise"] = Field(
        default="none",
        description="dp is DP-SGD at the sites with patients as the unit. With a whole site as the unit, noisy_updates cuts "
        "and noises an update before it leaves, and central_noise noises the mean of cut updates at a server that sites trust; "
        "whose updates were taken is not hidden",
    )
    epsilon: Positive | None = Field(
        default=None,
        description="most that a site's ledger may reach, over all rounds and runs that it holds (of central_noise the run's "
        "own); a round that would pass it is refused. Null sets no limit",
    )
    delta: OpenFraction = Field(default=1e-5, description="must be below 1 over a site's patients")
    noise_multiplier: Positive | None = Field(
        default=None, description="sigma, noise over clip; null takes the least with which all planned rounds fit into epsilon"
    )
    clip: Positive = Field(
        default=1.0,
        description="longest gradient of one patient in one step; where sites are the unit, longest update of a group",
    )
    studies_per_patient: Count = Field(
        default=4, description="at most so many of a patient's studies, drawn at random, make its gradient in one step"
    )
    trainable: Literal["all", "heads", "adapters"] = Field(
        default="all",
        description="what is trained, in every mode: everything; decoder, word head and last norms on a trunk that stays; or "
        "low-rank adapters of the trunk alone (fedmix/model/adapters.py)",
    )
    adapter_rank: Count = Field(default=4, description="rank of the adapters' change of each matrix, where these are trained")

    @model_validator(mode="after")
    def _noise_is_known(self) -> Privacy:
        if self.mode != "none" and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(f"mode = {self.mode} needs a budget epsilon, a noise_multiplier, or both")
        if self.model_fields_set and "mode" not in self.model_fields_set:  # said outright, none may stand beside values
            raise ValueError("privacy is described without its mode, and nothing would be protected; set mode to dp")
        return self

    @property
    def is_counted_by_sites(self) -> bool:
        """Whether each site keeps a ledger of what is spent and tells it with its update."""
        return self.mode in ("dp", "noisy_updates")


class SecureSum(Section):
    """The server learns sums of the sites' updates and no site's own (fedmix/federation/secure_sum.py).

    A site's update cannot be screened then: its clip, and the policy of the hospital it leaves, are what bounds it.
    """

    threshold: Annotated[int, Field(ge=2)] = Field(
        description="sites without which a tower's sum is not revealed; more than half of a stage's sites"
    )
    clip: Positive = Field(default=1.0, description="largest change of one parameter in a round; larger ones are cut to it")
    bits: Annotated[int, Field(ge=8, le=24)] = Field(
        default=24, description="of a change from -clip to clip; it travels in 32, so that sums do not overflow"
    )
