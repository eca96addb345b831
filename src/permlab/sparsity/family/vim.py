"""Vision Mamba, with the parameter names of mamba_ssm and of Vim.

One axis of inner channels runs through the convolutions and scans of both directions and their gate, so
the layers that read it fold only together.
"""

from permlab.sparsity.block_family import Family, Line

FAMILY = Family(
    models=("Vim",),
    needs="mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj",
    writes="mixer.out_proj",
    norms="norm",
    lines=(
        Line("mixer.in_proj", "mixer.in_proj", behind_norm=True),
        Line(
            "mixer.inner",
            "mixer.x_proj mixer.x_proj_b mixer.out_proj",
            "mixer.in_proj[0] mixer.in_proj[1] mixer.conv1d mixer.conv1d_b mixer.dt_proj mixer.dt_proj_b "
            "mixer.A_log mixer.A_b_log mixer.D mixer.D_b",
            coupling="shared",
        ),
        Line("mixer.x_proj", "mixer.x_proj", coupling="independent"),
        Line("mixer.x_proj_b", "mixer.x_proj_b", coupling="independent"),
        Line("mixer.out_proj", "mixer.out_proj", coupling="independent"),
        Line("mixer.dt_proj", "mixer.dt_proj", "mixer.x_proj[0]", optional=True),
        Line("mixer.dt_proj_b", "mixer.dt_proj_b", "mixer.x_proj_b[0]", optional=True),
    ),
    ends={0: "patch_embed patch_embed.proj norm", 2: "cls_token pos_embed"},
    head="head",
)
