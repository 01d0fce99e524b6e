"""Wrong settings of servers are refused with the setting and the value."""

import pytest
from projects import TestProject

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_experiment
from finetune_assets.serving.servers import servers_of

EXPERIMENT = "model: {base_model: demo-base}\nserving: {servers: [%s]%s}\n"


@pytest.mark.parametrize(
    ("servers", "more", "key", "value"),
    [
        ("", "", "serving.servers", "no server"),
        ("ftp://host", "", "serving.servers.0", "ftp://host"),
        ("'folder:'", "", "serving.servers.0", "folder:"),
        ("localhost", "", "serving.servers.0", "localhost"),
        ("http://host/v1", "", "serving.servers.0", "http://host/v1"),
        ("http://host:port", "", "serving.servers.0", "http://host:port"),
        ("http://a:1, http://a:1", "", "serving.servers.1", "http://a:1"),
        ("http://a:1", ", max_rank: 24", "serving.max_rank", "24"),
        ("http://a:1", ", verify_rows: 0", "serving.verify_rows", "0"),
        ("http://a:1", ", base_name: ' '", "serving.base_name", "blank"),
    ],
)
def test_refused(project: TestProject, servers: str, more: str, key: str, value: str) -> None:
    project.write_experiment("mine", EXPERIMENT % (servers, more))
    with pytest.raises(ConfigError) as error:
        load_experiment(project.configs, "mine")
    assert f"{key}: " in str(error.value)
    assert value in str(error.value)


def test_a_password_in_a_url_is_refused_and_not_shown(project: TestProject) -> None:
    project.write_experiment("mine", EXPERIMENT % ("'http://me:planted@host:8000'", ""))
    with pytest.raises(ConfigError) as error:
        load_experiment(project.configs, "mine")
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
