"""`python -P finetune_assets/data/chat/trial.py`: renders a chat template once, with little time and memory.

Reads from stdin a JSON object with `template`, `special` (special tokens) and `conversations` (each with `messages`,
`tools` and `prompt`), and exits with code 0 unless a limit is exceeded. What the template itself refuses is not an
error here. This file imports Jinja only, so that it starts in a tenth of a second.
"""

import json
import resource
import sys

CPU_SECONDS, MEMORY_BYTES = 2, 1 << 30
EXCEEDED = 3


def render(template: str, special: dict[str, object], conversations: list[dict[str, object]]) -> None:
    """Render the conversations, as far as the template accepts them; the environment is that of transformers.

    Raises:
        MemoryError: if the memory is exceeded.
    """
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: "jinja2.parser.Parser") -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(text: str) -> None:
        raise jinja2.TemplateError(text)

    def as_json(value: object, **options: object) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})  # type: ignore[arg-type]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "26 Jul 2024"}
    try:
        compiled = environment.from_string(template)
    except MemoryError:
        raise
    except Exception:  # an invalid template, which is reported where it is used
        return
    for conversation in conversations:
        values = {"add_generation_prompt": conversation["prompt"], "documents": None, **special}
        try:
            compiled.render(messages=conversation["messages"], tools=conversation["tools"], **values)
        except MemoryError:
            raise
        except Exception:  # this conversation is refused
            continue


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        render(**json.load(sys.stdin))
    except MemoryError:
        sys.exit(EXCEEDED)


if __name__ == "__main__":
    main()
