"""REINFORCE in plain JAX, with the judge's reward inside lax.scan.

Command: python launch/examples/reinforce.py

The policy is a toy: one row of logits for each caption position, the same for every image. All
images show a red three in the north. The policy learns to say so, since the judge then answers the
questions. Nothing leaves the device between the first step and the last.
"""

import jax
import jax.numpy as jnp
import numpy as np

import caprl_jax

GROUP, STEPS, RATE = 32, 60, 3.0
QUESTIONS = [
    {"question": "Which color is north?", "choices": ["red", "blue", "green"], "answer": "A"},
    {"question": "Which digit is north?", "choices": ["one", "three", "nine"], "answer": "B"},
]
# The caption is "digits: north COLOR DIGIT"; the policy draws the last two words.
WORDS = (" red", " blue", " green"), (" one", " three", " nine")


def train(reward: caprl_jax.Reward, judge: caprl_jax.LoadedJudge) -> tuple[jax.Array, jax.Array]:
    """Returns (float32 [STEPS] mean reward of each step, float32 [2, 3] final logits)."""
    head = jnp.asarray(judge.tokenizer.encode_caption("digits: north"))
    ids = [[judge.tokenizer.encode_caption(w) for w in words] for words in WORDS]
    width = max(len(i) for words in ids for i in words)
    padded = np.asarray([[i + [-1] * (width - len(i)) for i in words] for words in ids])
    questions = judge.questions([QUESTIONS], seed=0)

    def step(carry, key):
        params, logits = carry
        draw = jax.random.categorical(key, logits, shape=(GROUP, 2))
        words = jnp.asarray(padded)[jnp.arange(2), draw].reshape(GROUP, -1)
        tokens = jnp.concatenate([jnp.broadcast_to(head, (GROUP, head.size)), words], axis=-1)[None]
        rewards, _ = reward.apply(params, jnp.maximum(tokens, 0), tokens >= 0, questions)
        advantage = rewards[0] - jnp.mean(rewards[0])

        def loss(logits):
            logp = jax.nn.log_softmax(logits)[jnp.arange(2), draw].sum(-1)
            return -jnp.mean(advantage * logp)

        return (params, logits - RATE * jax.grad(loss)(logits)), jnp.mean(rewards)

    def run(params, keys):
        (_, logits), rewards = jax.lax.scan(step, (params, jnp.zeros((2, 3))), keys)
        return rewards, logits

    return jax.jit(run)(reward.params, jax.random.split(jax.random.key(0), STEPS))


def main() -> None:
    """Trains, and prints the mean reward every ten steps and the words that the policy prefers."""
    judge = caprl_jax.load_judge("asset:tiny/judge")
    rewards, logits = train(caprl_jax.make_reward(judge), judge)
    for i in range(0, STEPS, 10):
        print(f"steps {i + 1:2} to {i + 10}: mean reward {rewards[i : i + 10].mean():.3f}")
    best = [words[int(i)] for words, i in zip(WORDS, jnp.argmax(logits, axis=-1), strict=True)]
    print("the policy says: digits: north" + "".join(best))


if __name__ == "__main__":
    main()
