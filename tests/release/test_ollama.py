"""The Modelfile's template says what the chat template says: compared as Python and as Go's text/template render it."""

import json
import re
import shutil
import subprocess

import pytest
from hostile_templates import FOREVER, LARGE
from inference_fixtures import make_tokenizer
from transformers import AutoTokenizer

from llm_finetuning import prompts
from llm_finetuning.release import companions, ollama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '')"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"ours": None, "chatml": CHATML, "llama 3": LLAMA3, "gemma": GEMMA}
SYSTEMS = ["", "Answer in one sentence.\nBe kind.", 'Say "x" or """\n{{ .Content }} ends in """']
GO = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []Message }

func main() {
  var cases []Case
  if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
  texts := []string{}
  for _, c := range cases {
    var system []string
    for _, m := range c.Messages { if m.Role == "system" { system = append(system, m.Content) } }
    var out strings.Builder
    values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": c.Messages}
    if err := template.Must(template.New("").Parse(c.Template)).Execute(&out, values); err != nil { panic(err) }
    texts = append(texts, out.String())
  }
  json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def tokenizer_with(chat_template: str | None, system: str = ""):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    prompts.template_for(tokenizer, system)
    return tokenizer


def saved(folder, tokenizer):
    companions.write_tokenizer(folder, prompts.Template(tokenizer))
    (folder / "config.json").write_text(json.dumps({"model_type": "phi", "max_position_embeddings": 2048}))
    return folder


def template_of(modelfile: str) -> str:
    """As Ollama reads it: from the three quotes to those that end a line."""
    return re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.S | re.M)[1]


def conversations() -> list[list[dict]]:
    return list(ollama._conversations(ollama.CONTENTS, True))


def test_the_template_renders_in_go_as_the_chat_template_does(tmp_path):
    if not shutil.which("go"):
        pytest.skip("go is not installed: Debian has it as golang-go")
    cases, expected = [], []
    for chat_template in TEMPLATES.values():
        for number, system in enumerate(SYSTEMS):
            tokenizer = tokenizer_with(chat_template, system)
            folder = tmp_path / str(len(expected)) / str(number)
            folder.mkdir(parents=True)
            template = template_of(ollama.modelfile(saved(folder, tokenizer), "model.gguf"))
            for messages in conversations():
                cases.append(
                    {"Template": template, "Messages": [{k.title(): v for k, v in m.items()} for m in messages]}
                )
                expected.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    (tmp_path / "main.go").write_text(GO)
    ran = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")], input=json.dumps(cases), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected
    assert len(expected) == len(TEMPLATES) * len(SYSTEMS) * len(conversations()) == 648


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_stops_where_the_model_stops(tmp_path, name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    lines = ollama.modelfile(saved(tmp_path, tokenizer), "model.gguf").splitlines()
    assert lines[0] == "FROM ./model.gguf"
    stops = sorted(prompts.Template(tokenizer).stop_token_ids)
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(stops)
    ]
    assert "PARAMETER num_ctx 2048" in lines


def test_what_ollama_does_otherwise_is_said(tmp_path):
    text = ollama.modelfile(saved(tmp_path, tokenizer_with(LLAMA3)), "model.gguf")
    assert "takes blank space off" in text
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert (
        "no" in ollama.modelfile(saved(tmp_path, tokenizer_with(refusing)), "model.gguf").split("# This model was")[1]
    )


@pytest.mark.parametrize(
    "chat_template, reason",
    [
        ("{{ messages | length }} messages{% for m in messages %}{{ m['content'] }}{% endfor %}", "otherwise"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "otherwise than other"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "once, in order"),
        ("{% for m in messages %}{{ 'long' if m['content'] | length > 9 }}{{ m['content'] }}{% endfor %}", "otherwise"),
        ("{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}", "once, in order"),
        ("{{ raise_exception('closed') }}", "refuses the conversation: TemplateError: closed"),
        ("{% for m in messages %}{{ m['content'] | replace('\n', ' ') }}{% endfor %}", "otherwise"),
        ("{% if messages | length > 2 %}" + FOREVER + "{% endif %}" + CHATML, "computes for more than 1 s"),
        (CHATML + "{% if 'quoted' in messages[0].content %}{{ 'a' * 10**11 }}{% endif %}", LARGE),
    ],
)  # fmt: skip
def test_a_template_that_ollama_cannot_write_is_left_out_with_the_reason(chat_template, reason):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match=reason):
        ollama.turns(tokenizer)


def test_what_llama_cpp_puts_before_a_text_is_left_to_it(phi2_tokenizer_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(phi2_tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    prompts.template_for(tokenizer, "Be kind.")
    messages = [{"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<s>" + ollama.turns(tokenizer).render(messages) == expected
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="begins every text with <s>"):
        ollama.turns(tokenizer)
