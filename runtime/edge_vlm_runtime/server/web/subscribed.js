// Pictures of a camera of the server: docs/protocol.md, "Pictures for a subscriber".

const HEADER_BYTES = 24;

export function subscribedPicture(bytes) {
  if (bytes.byteLength <= HEADER_BYTES) return null;
  const view = new DataView(bytes);
  if (view.getUint8(0) !== 1 || view.getUint8(1) !== 1) return null; // of a newer server
  const blob = new Blob([new Uint8Array(bytes, HEADER_BYTES)], { type: "image/jpeg" });
  return { sequence: view.getUint32(8, true), blob };
}
