"""The group `serving` of an experiment."""

import pytest
from projects import TestProject

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import Serving
from finetune_assets.serving.servers import servers_of

EXPERIMENT = "model: {base_model: demo-base}\nserving: {servers: [%s]%s}\n"
SERVERS = ["http://127.0.0.1:8000", "https://gpu-1.example.org", "http://[::1]:8000/", "folder:./served"]


def experiment(project: TestProject, serving: str) -> Serving | None:
    project.write_experiment("mine", f"model: {{base_model: demo-base}}\nserving: {serving}\n")
    return load_experiment(project.configs, "mine").config.serving


def test_defaults(project: TestProject) -> None:
    assert load_experiment(project.configs, "demo").config.serving is None
    assert experiment(project, "null") is None
    assert experiment(project, f"{{servers: {SERVERS}}}") == Serving(SERVERS, 64, None, 32)


@pytest.mark.parametrize(
    ("serving", "named"),
    [
        ("{}", ["serving.servers", "no servers"]),
        ("{servers: []}", ["serving.servers", "no servers"]),
        ("{servers: [localhost]}", ["serving.servers", "'localhost'"]),
        ("{servers: ['ftp://host:1']}", ["serving.servers", "'ftp://host:1'"]),
        ("{servers: ['http://:8000']}", ["serving.servers", "'http://:8000'"]),
        ("{servers: ['http://host:x']}", ["serving.servers", "'http://host:x'"]),
        ("{servers: ['http://host:70000']}", ["serving.servers", "'http://host:70000'"]),
        ("{servers: ['http://host:8000/v1']}", ["serving.servers", "'http://host:8000/v1'"]),
        ("{servers: ['http://me:planted@host:8000']}", ["serving.servers", "FINETUNE_SERVING_TOKEN"]),
        ("{servers: ['http://host:8000/?key=planted']}", ["serving.servers", "FINETUNE_SERVING_TOKEN"]),
        ("{servers: ['folder: ']}", ["serving.servers", "'folder: '"]),
        ("{servers: ['http://host:1', 'http://host:1/']}", ["serving.servers", "twice"]),
        ("{servers: ['folder:./a'], max_rank: 24}", ["serving.max_rank", "24", "32"]),
        ("{servers: ['folder:./a'], base_name: ' '}", ["serving.base_name", "' '"]),
        ("{servers: ['folder:./a'], verify_rows: 0}", ["serving.verify_rows", "0"]),
    ],
)
def test_invalid_settings_name_key_and_value(project: TestProject, serving: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        experiment(project, serving)
    for text in ("mine.yaml", *named):
        assert text in str(error.value)
    assert "planted" not in str(error.value)


def test_servers_of_an_experiment(project: TestProject) -> None:
    project.write_experiment("mine", EXPERIMENT % ("'folder:./adapters', http://a:1, https://b", ", max_rank: 8"))
    config = load_experiment(project.configs, "mine").config
    servers = servers_of(config, project.root)
    assert servers
    assert [folder.path for folder in servers.folders] == [project.root / "adapters"]
    assert [replica.url for replica in servers.replicas] == ["http://a:1", "https://b"]
    assert (servers.settings.base_name, servers.settings.max_rank) == ("demo-base", 8)
    project.write_experiment("mine", EXPERIMENT % ("http://a:1", ""))
    servers = servers_of(load_experiment(project.configs, "mine").config, project.root)
    assert servers
    assert [folder.path for folder in servers.folders] == [project.root / ".finetune" / "serving"]
    assert servers_of(load_experiment(project.configs, "demo").config, project.root) is None
