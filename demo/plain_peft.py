"""Answer prompts with a downloaded adapter and nothing of Immunotune: plain transformers and peft.

Started as a fresh process: python plain_peft.py BASE_FOLDER ADAPTER_FOLDER NEW_TOKENS, prompts as JSON on standard
input, answers as JSON on standard output. It imports nothing of this repository: that is the point.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base_folder: str, adapter_folder: str, new_tokens: int) -> list[str]:
    """Greedy answers to the prompts on standard input."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    answers: list[str] = []
    for prompt in json.load(sys.stdin):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    json.dump(main(sys.argv[1], sys.argv[2], int(sys.argv[3])), sys.stdout)
