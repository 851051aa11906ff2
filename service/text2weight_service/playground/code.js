// The request as code. The key itself is never shown: both programs read it from the environment.

const KEY_VARIABLE = "TEXT2WEIGHT_KEY";

/** A curl command that sends exactly this body. */
export function curlCommand(address, body, hasKey) {
  return [
    "curl --fail-with-body --output head.safetensors",
    "--header 'Content-Type: application/json'",
    ...(hasKey ? [`--header "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    `--data '${JSON.stringify(body).replaceAll("'", "'\\''")}'`,
    `'${address}generate'`,
  ].join(" \\\n  ");
}

/** A Python program that sends exactly this body. JSON's strings and numbers are Python's too. */
export function pythonProgram(address, body, hasKey) {
  const { classes, ...others } = body;
  const list = `[${classes.map((name) => JSON.stringify(name)).join(", ")}]`;
  const named = Object.entries(others).map(([name, value]) => `, ${name}=${JSON.stringify(value)}`);
  const key = hasKey ? `, api_key=os.environ["${KEY_VARIABLE}"]` : "";
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from text2weight_client import Client",
    "",
    `with Client(${JSON.stringify(address.replace(/\/$/, ""))}${key}) as client:`,
    `    head = client.generate(${list}${named.join("")})`,
    'head.save("head.safetensors")',
    "",
  ].join("\n");
}
