// A step as it travels: gzip of [length of header, JSON header, byte planes of the token arrays].

const WIDTH = { i1: 1, i4: 4, f3: 3 };

export async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// The header as an object; its `tokens.arrays` become typed arrays.
export function readBlock(bytes) {
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  if (head.tokens) {
    const body = bytes.subarray(4 + length);
    const { count, arrays } = head.tokens;
    head.tokens.columns = {};
    for (const [name, [form, at]] of Object.entries(arrays)) {
      head.tokens.columns[name] = joinPlanes(body.subarray(at, at + WIDTH[form] * count), form, count);
    }
  }
  return head;
}

// Byte planes, lowest first, to numbers. f3 is a float32 whose lowest byte is zero.
export function joinPlanes(planes, form, count) {
  if (form === "i1") return Int8Array.from(planes, (byte) => (byte << 24) >> 24);
  const words = new Uint32Array(count);
  const shift = form === "f3" ? 8 : 0;
  for (let plane = 0; plane < WIDTH[form]; plane += 1) {
    for (let i = 0; i < count; i += 1) words[i] |= planes[plane * count + i] << (8 * plane + shift);
  }
  return form === "i4" ? new Int32Array(words.buffer) : new Float32Array(words.buffer);
}
