/** An error whose message is the line that the page shows. */
export class Told extends Error {}
