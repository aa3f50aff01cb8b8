(() => {
  const cards = document.querySelector(".cards"), rows = document.querySelector("#overview tbody");
  const find = document.querySelector("#find"), sort = document.querySelector("#sort"), count = document.querySelector("#count");
  const all = [...cards.children];
  const arrange = () => {
    const [key, direction] = sort.value.split(" "), wanted = find.value.trim().toLowerCase();
    const value = (card) => key === "name" ? card.dataset.name : Number(card.dataset[key]);
    const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * Number(direction);
    let shown = 0;
    for (const card of [...all].sort(compare)) {
      const row = document.getElementById("row-" + card.id);
      card.hidden = row.hidden = !card.textContent.toLowerCase().includes(wanted);
      shown += !card.hidden;
      cards.append(card);
      rows.append(row);
    }
    count.textContent = shown === all.length ? `${shown} atoms` : `${shown} of ${all.length} atoms`;
  };
  document.querySelector(".tools").hidden = false;
  find.addEventListener("input", arrange);
  sort.addEventListener("change", arrange);
})();
