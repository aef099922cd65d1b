"""The command line: every option of `config.py`, grouped by section."""

import tyro

from .config import Config, ConfigError
from .presets import preset

_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line; `--resume` starts from the options of the saved run.

    Raises:
        ConfigError: If the options do not fit together, or the saved ones are broken.
    """
    config = _parse(argv, Config())
    if config.preset != "tiny":
        config = _parse(argv, preset(config.preset))
    path = config.folder / "config.json"
    if not (config.run.resume and path.exists()):
        return config
    # More steps leave the schedule as it was, unless told otherwise.
    saved = Config.load(path)
    resumed = _parse(argv, saved.replace(decay_steps=saved.train.schedule))
    if resumed.train.steps < saved.train.steps:
        raise ConfigError(
            f"Rule: a resumed run has at least the steps it was started with, "
            f"{saved.train.steps}. Given: --steps {resumed.train.steps}."
        )
    return resumed


def _parse(argv: list[str] | None, default: Config) -> Config:
    return tyro.cli(Config, args=argv, default=default, config=_STYLE)
