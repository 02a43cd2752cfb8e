// "Choose a folder": its pictures are packed into a zip (stored, not compressed) here in the browser and handed to the
// upload field, because a browser sends files without the folders they lay in.
const PICTURE = /\.(png|jpe?g|webp|gif|bmp|tiff?)$/i;
const TABLE = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xEDB88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});
const crc32 = (bytes) => {
  let c = 0xFFFFFFFF;
  for (let i = 0; i < bytes.length; i++) c = TABLE[(c ^ bytes[i]) & 255] ^ (c >>> 8);
  return (c ^ 0xFFFFFFFF) >>> 0;
};
const record = (size, fields) => {
  const view = new DataView(new ArrayBuffer(size));
  fields.forEach(([at, bytes, value]) => bytes === 4 ? view.setUint32(at, value, true) : view.setUint16(at, value, true));
  return new Uint8Array(view.buffer);
};
const pack = async (files, told) => {
  const parts = [], index = [];
  let at = 0, done = 0;
  for (const file of files) {
    const name = new TextEncoder().encode(file.webkitRelativePath || file.name);
    const bytes = new Uint8Array(await file.arrayBuffer()), crc = crc32(bytes), size = bytes.length;
    const same = [[0, 2, 20], [2, 2, 0x800], [4, 2, 0], [6, 2, 0], [8, 2, 33], [10, 4, crc], [14, 4, size], [18, 4, size], [22, 2, name.length]];
    const moved = (by) => same.map(([a, b, v]) => [a + by, b, v]);
    parts.push(record(30, [[0, 4, 0x04034b50], ...moved(4)]), name, bytes);
    index.push(record(46, [[0, 4, 0x02014b50], [4, 2, 20], ...moved(6), [42, 4, at]]), name);
    at += 30 + name.length + size;
    if (++done % 50 === 0) told(`${done} of ${files.length} pictures packed`);
  }
  const length = index.reduce((sum, part) => sum + part.length, 0);
  const end = record(22, [[0, 4, 0x06054b50], [8, 2, files.length], [10, 2, files.length], [12, 4, length], [16, 4, at]]);
  return new File([...parts, ...index, end], 'pictures.zip', {type: 'application/zip'});
};
const say = (text) => { element.querySelector('.said').textContent = text; };
element.addEventListener('click', (event) => {
  if (event.target.closest('.pick')) element.querySelector('input').click();
});
element.addEventListener('change', async (event) => {
  const files = [...event.target.files].filter((file) => PICTURE.test(file.name));
  event.target.value = '';
  event.stopPropagation();
  if (!files.length) return say('This folder holds no pictures.');
  if (files.length > 65000) return say('A folder of more than 65,000 pictures is for the command line.');
  const field = document.querySelector('#fs-upload input[type=file]');
  if (!field) return say('Remove the file above first.');
  say(`packing ${files.length} pictures`);
  const box = new DataTransfer();
  box.items.add(await pack(files, say));
  field.files = box.files;
  field.dispatchEvent(new Event('change', {bubbles: true}));
  say('');
});
