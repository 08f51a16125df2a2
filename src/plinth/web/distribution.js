// What temperature, top-k, top-p and min-p do to a distribution: the rule of plinth.inference.sampling, in the browser.

// The whole distribution, most probable token first, as log-probabilities in nats; base64 of float32, little endian.
export function decodeLogprobs(text) {
  return new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

// What is left of sorted log-probabilities: the first `kept` tokens, of which the one at rank i is drawn with probability at(i).
// A setting that is null keeps everything. All three cuts keep the most probable tokens, so what is kept is always a beginning.
export function truncated(logprobs, { temperature, top_k, top_p, min_p }) {
  if (temperature === 0) return { kept: 1, at: (i) => (i === 0 ? 1 : 0), entropy: 0 };
  const weights = Float64Array.from(logprobs, (value) => Math.exp((value - logprobs[0]) / temperature));
  let kept = Math.min(top_k ?? weights.length, weights.length);
  if (top_p !== null && top_p < 1) kept = nucleus(weights, kept, top_p);
  if (min_p) {
    let count = 1;
    while (count < kept && weights[count] >= min_p * weights[0]) count += 1;
    kept = count;
  }
  let total = 0;
  for (let i = 0; i < kept; i++) total += weights[i];
  return { kept, at: (i) => (i < kept ? weights[i] / total : 0), entropy: entropy(weights, kept, total) };
}

// How many of the first `count` weights it takes to reach the share top_p of their sum.
function nucleus(weights, count, top_p) {
  let total = 0, reached = 0;
  for (let i = 0; i < count; i++) total += weights[i];
  for (let i = 0; i < count; i++) {
    reached += weights[i];
    if (reached >= top_p * total) return i + 1;
  }
  return count;
}

function entropy(weights, kept, total) {
  let nats = 0;
  for (let i = 0; i < kept; i++) {
    const share = weights[i] / total;
    if (share > 0) nats -= share * Math.log(share);
  }
  return nats;
}
