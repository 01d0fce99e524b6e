"""Names of secrets are found among those of settings and environment variables, and others are not taken for them."""

import pytest
from paths import ROOT
from projects import TestProject

from finetune_assets.config.errors import ConfigError, is_secret, names_secret
from finetune_assets.config.loading import load_experiment

SECRETS = """
DB_PASSWD GITHUB_PAT SSH_KEY AUTH HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID
AWS_SESSION_TOKEN WANDB_API_KEY MY_API_KEY OPENAI_APIKEY PGPASSWORD MYSQL_PWD NEW_PASSWORD SMTP_PASS BASIC_AUTH
NPM_CONFIG__AUTH SSH_PRIVATE_KEY SSH_KEY_BASE64 SIGNING_KEY SLURM_JWT SENTRY_DSN GIT_CREDENTIALS GIT_TOKENS COOKIE
X_AUTH_HEADER DOCKER_AUTH_CONFIG SLACK_WEBHOOK_URL AZURE_STORAGE_KEY AZURE_STORAGE_SAS_TOKEN
AZURE_STORAGE_CONNECTION_STRING KUBE_BEARER PASSPHRASE client_secret apiKey dbPassword github-token
""".split()
OTHERS = """
TOKENIZERS_PARALLELISM NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME MAX_TOKENS HF_HUB_OFFLINE HF_HUB_DISABLE_IMPLICIT_TOKEN
HF_HOME HF_TOKEN_PATH PATH PYTHONPATH LD_PRELOAD LD_LIBRARY_PATH PWD OLDPWD SSH_AUTH_SOCK XAUTHORITY AUTHOR MONKEY
KEYBOARD KEYRING PATTERN PATIENCE COMPASS BYPASS PASSIVE OMP_NUM_THREADS OMP_WAIT_POLICY CUDA_VISIBLE_DEVICES NCCL_DEBUG
NCCL_IB_PKEY PYTORCH_CUDA_ALLOC_CONF AWS_WEB_IDENTITY_TOKEN_FILE AWS_SHARED_CREDENTIALS_FILE EOS_TOKEN BATCH_TOKENS
GOOGLE_APPLICATION_CREDENTIALS UCX_TLS TORCH_NCCL_TRACE_BUFFER_SIZE
""".split()


@pytest.mark.parametrize("name", SECRETS)
def test_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", OTHERS)
def test_no_secret(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "planted") for name in ("DB_PASSWD", "GITHUB_PAT", "SSH_KEY", "AUTH")),
        ("DATABASE_URL", "postgres://me:planted@db.example.org/x"),
        ("HTTPS_PROXY", "http://corp:planted@proxy.example.org:3128"),
        ("DEPLOY", "ghp_planted0000000000000000000000000000"),
    ],
)
def test_environment_of_a_job_refuses_it_and_tells_its_name_alone(project: TestProject, name: str, value: str) -> None:
    project.write_experiment(
        "mine", f"model: {{base_model: demo-base}}\nlauncher: {{environment: {{{name}: '{value}'}}}}"
    )
    with pytest.raises(ConfigError) as error:
        load_experiment(project.configs, "mine")
    assert "mine.yaml: launcher.environment: " in str(error.value)
    assert name in str(error.value)
    assert "planted" not in str(error.value)


def test_environment_of_a_job_takes_the_usual_names(project: TestProject) -> None:
    lines = [f"    {name}: 'https://example.org:80/x@y'" for name in OTHERS if name.isupper()]
    text = "\n".join(["model: {base_model: demo-base}", "launcher:", "  environment:", *lines])
    project.write_experiment("mine", text)
    assert len(load_experiment(project.configs, "mine").config.launcher.environment) == len(lines)


@pytest.mark.parametrize(
    "override",
    [
        "launcher={environment: {DB_PASSWD: planted}}",
        "wandb={project: a, entity: b, api_key: planted}",
        "training.github_pat=planted",
        "model={'ssh_key' : planted}",
    ],
)
def test_error_of_an_override_does_not_tell_it(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(ROOT / "configs", "demo", [override])
    assert "planted" not in str(error.value)


def test_numbers_of_tokens_are_told() -> None:
    assert not names_secret("evaluation.max_new_tokens=0")
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        load_experiment(ROOT / "configs", "demo", ["evaluation.max_new_tokens=0"])
