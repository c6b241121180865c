// The camera of a computer: its stream, and one picture of it. Browsers give it to
// pages from https:// and from this machine alone.

import { Told } from './told.js';

const $ = (id) => document.getElementById(id);

/** Whether there is a camera that this page may ask for. */
export async function hasCamera() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return devices.some(({ kind }) => kind === 'videoinput');
}

/** Shows the stream until a picture is taken, and gives it as a file; null if none is.
 * `watch(video)` is called for one frame after the other. */
export async function takePicture(watch) {
  const dialog = $('viewfinder');
  const video = $('video');
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: true });
  } catch {
    throw new Told('The camera cannot be used: it is taken, or was not allowed.');
  }
  try {
    $('shoot').disabled = true;
    video.srcObject = stream;
    dialog.returnValue = '';
    dialog.showModal();
    const closed = new Promise((done) => (dialog.onclose = done));
    await Promise.race([video.play(), closed]);
    $('shoot').disabled = false;
    while (dialog.open) {
      await watch(video);
      // The page draws in between, also where the model is quick.
      await Promise.race([new Promise(requestAnimationFrame), closed]);
    }
    return dialog.returnValue === 'shoot' ? await freeze(video) : null;
  } finally {
    dialog.close();
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  }
}

async function freeze(video) {
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext('2d').drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done));
  return new File([blob], 'camera.png', { type: blob.type });
}
