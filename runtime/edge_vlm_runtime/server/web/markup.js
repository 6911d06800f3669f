// Points and tracks in an answer: `<points coords="...">label</points>`. They are drawn, and a
// reader is shown the label alone. The server's reader of them is edge_vlm/text/points.py.

const TAG = /<(points|tracks)\b[^<>]*>(?:([^<]*)<\/\1>)?/g;
const BEGUN = /<(?:p|t|po|tr|poi|tra|poin|trac|point|track|(?:points|tracks)\b[^>]*)?$/;

// The text without markup. A label that is only begun in `text` waits for its end.
export function withoutMarkup(text) {
  return text.replace(TAG, (_, kind, label) => label?.trim() || "(here)").replace(BEGUN, "");
}
