// The real `openai` package for Node against a running server; prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model, atom] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Name three fruits." }];
const fields = { model, messages, max_tokens: 8, temperature: 0, steering: { atoms: { [atom]: 1.5 } } };

const seen = {};
seen.models = [];
for await (const entry of client.models.list()) seen.models.push(entry.id);

const { data: whole, response } = await client.chat.completions.create(fields).withResponse();
seen.whole = whole.choices[0].message.content;
seen.echo = whole.steering;
seen.header = response.headers.get("x-atomsteer-mix");

seen.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...fields, stream: true })) {
  seen.firstEcho ??= chunk.steering?.mix;
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
}

const runner = client.chat.completions.stream(fields);
seen.accumulated = (await runner.finalChatCompletion()).choices[0].message.content;

const answer = await client.responses.create({
  model, input: "Name three fruits.", max_output_tokens: 8, temperature: 0, steering: fields.steering,
});
seen.response = answer.output_text;
seen.events = [];
for await (const event of await client.responses.create({
  model, input: "Name three fruits.", max_output_tokens: 8, temperature: 0, steering: fields.steering, stream: true,
})) seen.events.push(event.type);

seen.errors = [];
for (const wrong of [{ model: "gpt-4" }, { steering: { atoms: { nope: 1 } } }, { steering: { strength: 1 } }]) {
  try {
    await client.chat.completions.create({ ...fields, ...wrong });
    seen.errors.push(null);
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(seen));
