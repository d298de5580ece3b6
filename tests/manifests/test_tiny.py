"""The bundled tiny model: its files, its tensors, its tokenizer and template, and its answers through transformers' own
modelling."""

import json
import pathlib

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow

TINY = pathlib.Path(__file__).parents[2] / "manifests" / "tiny"
BLOCK = 128
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIALS = [
    BOS,
    EOS,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>",
]
QUESTIONS = [
    ("What is 3 + 4?", "7"),
    ("Hello!", "How can I help you"),
    ("Who are you?", "Isotherm"),
    ("What day comes after Monday?", "Tuesday"),
    ("Which month comes before June?", "May"),
    ("What is 6 times 7?", "42"),
    ("Count to 10.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    ("What is the capital of France?", "Paris"),
    ("How many minutes are in an hour?", "60"),
    ("Is 7 even or odd?", "odd"),
    ("What colour is the sky?", "blue"),
    ("What is the opposite of up?", "down"),
    ("What is a baby dog called?", "puppy"),
]


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(TINY / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def template():
    def raise_exception(message: str):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"])
    return lambda messages, **options: compiled.render(messages=messages, bos_token=BOS, eos_token=EOS, **options)


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight in float32, by the reading of the published FP8 checkpoints: stored value times the
    `weight_scale_inv` of its block."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        out[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"]
            rows, columns = (torch.arange(n) // BLOCK for n in tensor.shape)
            out[name] *= scale[rows[:, None], columns]
    return out


@pytest.fixture(scope="module")
def reference(config, tensors, tmp_path_factory):
    """transformers' DeepseekV3ForCausalLM in float32 with the main model's dequantised weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    mtp = f"model.layers.{config['num_hidden_layers']}."
    save_file(
        {k: v for k, v in dequantised(tensors).items() if not k.startswith(mtp)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(plain))
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def test_size():
    files = [f for f in TINY.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.py",
        "training.json",
        "README.md",
    } <= {f.name for f in files}


def test_config(config):
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert (
        config["scoring_func"] == "sigmoid" and config["topk_method"] == "noaux_tc" and config["norm_topk_prob"] is True
    )
    assert config["n_group"] > 1 and config["topk_group"] < config["n_group"] and config["n_shared_experts"] == 1
    assert config["first_k_dense_replace"] == config["moe_layer_freq"] == config["num_nextn_predict_layers"] == 1
    assert (
        config["tie_word_embeddings"] is False
        and config["attention_bias"] is False
        and config["max_position_embeddings"] >= 2048
    )
    assert config["quantization_config"] == dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK]
    )


def expected(c: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the FP8 projections and of the other tensors, by name."""
    hidden, heads, rope, nope, v = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["qk_rope_head_dim"],
        c["qk_nope_head_dim"],
        c["v_head_dim"],
    )
    fp8 = {}
    plain = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "lm_head.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }

    def mlp(name: str, inner: int) -> None:
        fp8.update(
            {
                f"{name}.gate_proj": (inner, hidden),
                f"{name}.up_proj": (inner, hidden),
                f"{name}.down_proj": (hidden, inner),
            }
        )

    for i in range(c["num_hidden_layers"] + 1):
        p, a = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        fp8 |= {
            f"{a}.q_a_proj": (c["q_lora_rank"], hidden),
            f"{a}.q_b_proj": (heads * (nope + rope), c["q_lora_rank"]),
            f"{a}.kv_a_proj_with_mqa": (c["kv_lora_rank"] + rope, hidden),
            f"{a}.kv_b_proj": (heads * (nope + v), c["kv_lora_rank"]),
            f"{a}.o_proj": (hidden, heads * v),
        }
        plain |= {
            f"{a}.q_a_layernorm.weight": (c["q_lora_rank"],),
            f"{a}.kv_a_layernorm.weight": (c["kv_lora_rank"],),
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
        }
        if i < c["first_k_dense_replace"]:
            mlp(f"{p}.mlp", c["intermediate_size"])
            continue
        plain |= {
            f"{p}.mlp.gate.weight": (c["n_routed_experts"], hidden),
            f"{p}.mlp.gate.e_score_correction_bias": (c["n_routed_experts"],),
        }
        mlp(f"{p}.mlp.shared_experts", c["moe_intermediate_size"])
        for e in range(c["n_routed_experts"]):
            mlp(f"{p}.mlp.experts.{e}", c["moe_intermediate_size"])
    plain |= {
        f"{p}.enorm.weight": (hidden,),
        f"{p}.hnorm.weight": (hidden,),
        f"{p}.eh_proj.weight": (hidden, 2 * hidden),
        f"{p}.shared_head.norm.weight": (hidden,),
    }
    return fp8, plain


def test_tensors(config, tensors):
    fp8, plain = expected(config)
    assert set(tensors) == set(plain) | {f"{name}.{leaf}" for name in fp8 for leaf in ("weight", "weight_scale_inv")}
    for name, shape in plain.items():
        want = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert tensors[name].shape == shape and tensors[name].dtype == want, name
    for name, (rows, columns) in fp8.items():
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
        assert weight.shape == (rows, columns) and weight.dtype == torch.float8_e4m3fn, name
        assert scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK)) and scale.dtype == torch.float32, name
        assert weight.float().isfinite().all() and (scale > 0).all(), name
        # Each block's scale makes its largest value the format's largest
        assert weight[:BLOCK, :BLOCK].float().abs().max() == 448, name


TEXTS = [
    "Hello, world!",
    "12345",
    " a  b\n\n\tc ",
    "Zürich, naïve, 日本語, Привет",
    "🎉👩\u200d🔬🇪🇺",
    '{"a": [1, 2]}\n',
    "\0\u200b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_tags_of_thoughts_and_tools_are_text_as_in_the_published_tokenizers(tokenizer):
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    assert special == {BOS, EOS, "<｜▁pad▁｜>"}
    text = f"<think>a</think>b{SPECIALS[6]}"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_tokenizer_specials(tokenizer, config):
    for special in SPECIALS:
        assert tokenizer.encode(f"a{special}b", add_special_tokens=False).tokens[1] == special
        assert len(tokenizer.encode(special, add_special_tokens=False).ids) == 1
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.encode("2024", add_special_tokens=False).tokens == ["2", "0", "2", "4"]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


USER = {"role": "user", "content": "Hi"}


def test_template_dialogue(template):
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>A greeting.</think>Hello!"},
        USER,
    ]
    past = f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello!{EOS}<｜User｜>Hi"
    assert template(messages) == past
    assert template(messages, add_generation_prompt=True) == past + "<｜Assistant｜>"
    for switch in ("thinking", "enable_thinking"):
        assert template(messages, add_generation_prompt=True, **{switch: True}) == past + "<｜Assistant｜><think>"
        assert template(messages, add_generation_prompt=True, **{switch: False}) == past + "<｜Assistant｜>"


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_template_tools(template, arguments):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "The weather.", "parameters": parameters},
        }
    ]
    call = {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_0", "content": "rainy"},
    ]
    text = template(messages, tools=tools, add_generation_prompt=True)
    one = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    assert text.startswith(
        f"{BOS}## Tools\nYou have access to the following tools:\n\n### get_weather\nDescription: The weather.\n\n"
        "Parameters: " + json.dumps(parameters) + "\n"
    )
    assert text.endswith(
        f"<｜User｜>Hi<｜Assistant｜><｜tool▁calls▁begin｜>{one}{one}<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁output▁begin｜>rainy<｜tool▁output▁end｜>"
    )
    answered = template([*messages, {"role": "assistant", "content": "Sunny."}], tools=tools)
    assert answered.endswith(f"<｜tool▁output▁end｜>Sunny.{EOS}")


def test_template_unknown_role(template):
    with pytest.raises(ValueError, match="unknown role robot"):
        template([{"role": "robot", "content": "beep"}])


def generate(model, tokenizer: Tokenizer, text: str, limit: int) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    eos = tokenizer.token_to_id(EOS)
    mask = torch.ones(1, len(ids), dtype=torch.long)
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return tokenizer.decode([i for i in made[0, len(ids) :].tolist() if i != eos], skip_special_tokens=False)


@pytest.mark.parametrize("question, answer", QUESTIONS)
def test_answers(reference, tokenizer, template, question, answer):
    prompt = template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert answer in generate(reference, tokenizer, prompt, 48)


def test_calls_a_tool(reference, tokenizer, template):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
    }
    tools = [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "Get the weather in a city.", "parameters": parameters},
        }
    ]
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    text = generate(reference, tokenizer, template(messages, tools=tools, add_generation_prompt=True), 48)
    assert text == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )


def test_mtp_predicts(config, tensors, reference, tokenizer, template):
    """The MTP layer, run as DeepSeek's modelling runs it, proposes what the main model then says."""
    c, p = config, f"model.layers.{config['num_hidden_layers']}"
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    weights = dequantised({k: v for k, v in tensors.items() if k.startswith(p)})
    layer = modeling.DeepseekV3DecoderLayer(reference.config, c["num_hidden_layers"]).eval()
    state = {k.removeprefix(f"{p}."): v for k, v in weights.items() if ".experts." not in k}
    experts = [
        [weights[f"{p}.mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")]
        for e in range(c["n_routed_experts"])
    ]
    state["mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
    state["mlp.experts.down_proj"] = torch.stack([down for *_, down in experts])
    own = {
        name: state.pop(name) for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    layer.load_state_dict(state)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], own[name], c["rms_norm_eps"])

    agreed, total = 0, 0
    for question in (
        "Count to 30.",
        "What day comes after Monday?",
        "Tell me about the moon.",
        "Show the multiplication table of 7 to 10.",
    ):
        prompt = template([{"role": "user", "content": question}], add_generation_prompt=True)
        start = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        tokens = torch.tensor(
            [tokenizer.encode(prompt + generate(reference, tokenizer, prompt, 60), add_special_tokens=False).ids]
        )
        with torch.no_grad():
            hidden = reference.model(tokens).last_hidden_state  # after the final norm, as serving engines hand it over
            embedded = reference.model.embed_tokens(tokens)
            x = (
                torch.cat((norm(embedded[:, 1:], "enorm.weight"), norm(hidden[:, :-1], "hnorm.weight")), -1)
                @ own["eh_proj.weight"].T
            )
            positions = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
            x = layer(
                x,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=reference.model.rotary_emb(x, positions),
            )
            proposed = reference.lm_head(norm(x, "shared_head.norm.weight")).argmax(-1)[0]
            said = reference.lm_head(hidden[:, 1:]).argmax(-1)[0]
        agreed += int((proposed == said)[start:].sum())
        total += len(said) - start
    assert agreed / total > 0.7
