"""Named configurations: TOML files that ``--config NAME`` finds."""

from importlib.resources import files
from pathlib import Path

from samv2.common.errors import ConfigError


def config_path(name: str) -> Path:
    """A file by path, or one of the shipped configurations by name.

    Raises:
        ConfigError: there is neither; lists the shipped names.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(files(__name__))) / f"{name}.toml"
    if shipped.is_file():
        return shipped
    names = ", ".join(shipped_names())
    raise ConfigError(
        [f"there is no config {name!r}; give a TOML file or one of {names}"]
    )


def shipped_names() -> list[str]:
    """Names of the shipped configurations, sorted."""
    return sorted(item.stem for item in Path(str(files(__name__))).glob("*.toml"))
