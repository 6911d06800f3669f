"""Home Assistant's own check of discovery messages. Runs in an environment that has Home Assistant:

    python3.13 -m venv ha
    ha/bin/pip install homeassistant==2025.4.4 paho-mqtt numpy hassil home-assistant-intents
    ha/bin/pip install PyTurboJPEG av
    ha/bin/python tests/runtime/alerts/home_assistant_schema.py \\
        --record tests/data/home_assistant.json
    EDGE_VLM_HOME_ASSISTANT=ha/bin/python pytest tests/runtime/alerts/test_home_assistant.py

Standard input: a JSON list of [component, config], or ["automation", its fields]; standard output:
a list of what is wrong. With --record it writes which keys each component knows: what it does not
know it drops without a word.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

COMPONENTS = ("binary_sensor", "image", "notify", "sensor", "text")


def schema_of(component: str) -> Any:
    return importlib.import_module(f"homeassistant.components.mqtt.{component}").DISCOVERY_SCHEMA


def keys_of(schema: Any) -> set[str]:
    """All keys of a voluptuous schema, through those that are made of several."""
    if isinstance(getattr(schema, "schema", None), dict):
        return {str(key) for key in schema.schema}
    return {key for part in getattr(schema, "validators", ()) for key in keys_of(part)}


def main() -> None:
    version = importlib.import_module("homeassistant.const").__version__
    if sys.argv[1:2] == ["--record"]:
        keys = {component: sorted(keys_of(schema_of(component))) for component in COMPONENTS}
        found = {"home_assistant": version, "keys": keys}
        Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
        return
    print(json.dumps(asyncio.run(check(json.load(sys.stdin)))))


async def check(messages: list[tuple[str, dict[str, Any]]]) -> list[str]:
    core = importlib.import_module("homeassistant.core")
    frame = importlib.import_module("homeassistant.helpers.frame")
    frame.async_setup(core.HomeAssistant(tempfile.mkdtemp()))  # templates want one
    wrong: list[str] = []
    for component, config in messages:
        try:
            if component == "automation":
                rules = importlib.import_module("homeassistant.helpers.config_validation")
                rules.TRIGGER_SCHEMA(config["triggers"])
                rules.SCRIPT_SCHEMA(config["actions"])
                continue
            kept = schema_of(component)(config)
        except Exception as error:  # noqa: BLE001  of voluptuous, which this file cannot import
            wrong.append(f"{component}: {error}")
            continue
        wrong += [f"{component} does not know {key}" for key in config if key not in kept]
    return wrong


if __name__ == "__main__":
    main()
