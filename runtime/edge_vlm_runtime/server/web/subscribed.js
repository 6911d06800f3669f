// Pictures of a camera of the server: binary messages as those that a client sends, see
// docs/protocol.md, "Frames".

const HEADER_BYTES = 24;

// {sequence, blob, bitmap}, or null for what is no JPEG or comes from a newer server.
export async function subscribedPicture(bytes) {
  if (bytes.byteLength <= HEADER_BYTES) return null;
  const view = new DataView(bytes);
  if (view.getUint8(0) !== 1 || view.getUint8(1) !== 1) return null;
  const blob = new Blob([new Uint8Array(bytes, HEADER_BYTES)], { type: "image/jpeg" });
  const bitmap = await createImageBitmap(blob).catch(() => null);
  return bitmap === null ? null : { sequence: view.getUint32(8, true), blob, bitmap };
}
