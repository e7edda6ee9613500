#!/bin/sh
# Makes glm-nano from nothing: corpus, tokenizer, four stages of training, package, measurement. About an hour and a
# half on two quiet cores.
# Run it in an environment with glmkit[train,evaluate]; what it writes lies in build/nano and src/glmkit/builtin.
set -eu
cd "$(dirname "$0")/.."
mkdir -p build/nano/tokenizer
# Large blocks of memory are kept instead of returned to the system after every step: a fifth faster on glibc.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
python nano/corpus.py --out build/nano --records 80000 --style-out src/glmkit/builtin/data
python nano/tokenizer.py --corpus build/nano/train.jsonl --out build/nano/tokenizer/tokenizer.model
printf '{"tokenizer_class": "ChatGLMTokenizer", "generation": 3}\n' >build/nano/tokenizer/tokenizer_config.json
glm finetune nano
glm finetune nano_mixed
glm finetune nano_protocol
glm finetune nano_balance
python nano/package.py build/nano/balance/model src/glmkit/builtin/glm-nano
python nano/evaluate.py build/nano/heldout.jsonl --json nano/evaluation.json
