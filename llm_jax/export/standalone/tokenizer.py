# ruff: noqa
# fmt: off
#: begin
#: if raw_bytes
class Tokenizer:
    """The bytes of a text in UTF-8 are its tokens."""

    def __init__(self, params):
        self.pieces = [bytes([i]) if i < 256 else b"" for i in range(given.num_tokens)]

    def encode(self, text):
        return list(text.encode("utf-8"))


#: end
#: if byte_level
# How a text is cut into words; no token reaches over two. \p{L} are the letters of Unicode, and so on.
PATTERN = given.pattern


def compile_pattern():
    r"""PATTERN for Python's `re`, which knows no \p and takes more characters for spaces."""
    categories = [unicodedata.category(chr(i)) for i in range(0x110000)]  # "Lu", "Nd", ...
    runs, end = [], 0
    for category, run in itertools.groupby(categories):
        start, end = end, end + len(list(run))
        runs.append((category, f"\\U{start:08x}-\\U{end - 1:08x}"))

    def ranges(match):
        return "".join(run for category, run in runs if category.startswith(match[1]))

    spaces = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    pattern = re.sub(r"\\p\{(\w+)\}", ranges, PATTERN).replace(r"\s", spaces)
    return re.compile(f"({pattern})")


#: end
#: if not raw_bytes
class Tokenizer:
    #: if byte_level
    """Byte-level byte-pair encoding: a word is joined from its bytes (Radford et al. 2019)."""
    #: elif unigram
    """SentencePiece's unigram model: a text is cut where that is most probable (Kudo 2018)."""
    #: else
    """Byte-pair encoding as SentencePiece does it: a text is joined from its characters.

    A character that no token has becomes the bytes of its UTF-8 (Sennrich et al. 2016; Kudo 2018).
    """
    #: end

    def __init__(self, params):
        ends = [0, *np.cumsum(params["tokenizer.lengths"]).tolist()]
        data = params["tokenizer.bytes"].tobytes()
        self.pieces = [data[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]
        #: if not (byte_level and by_rank)
        self.byte_ids = params["tokenizer.byte_ids"].tolist()
        #: end
        #: if by_rank
        ranks = params["tokenizer.ranks"].tolist()  # -1: no text becomes this token
        known = [i for i, rank in enumerate(ranks) if rank >= 0]
        self.ids = {self.pieces[i]: i for i in known}
        self.ranks = {self.pieces[i]: ranks[i] for i in known}
        #: end
        #: if by_pair
        merges = params["tokenizer.merges"].tolist()  # left, right and both together
        self.merges = {(a, b): (rank, both) for rank, (a, b, both) in enumerate(merges)}
        #: if whole_words or not byte_level
        self.ids = {self.pieces[i]: i for i in params["tokenizer.known"].tolist()}
        #: end
        #: end
        #: if unigram
        scores = params["tokenizer.scores"]  # log probabilities
        self.known = {}
        for i in params["tokenizer.known"].tolist():
            self.known[self.pieces[i].decode("utf-8")] = (scores[i], i)
        self.longest = max(map(len, self.known))
        #: end
        #: if user_defined
        whole = params["tokenizer.user_defined"].tolist()  # found in a text before anything else
        self.whole = {self.pieces[i].decode("utf-8"): i for i in whole}
        longest_first = sorted(map(re.escape, self.whole), key=len, reverse=True)
        self.border = re.compile(f"({'|'.join(longest_first)})")
        #: end
        #: if byte_level
        self.pattern = compile_pattern()
        #: end

    #: if user_defined
    def encode(self, text):
        ids = []
        #: if space_before
        text = " " + text if text else text
        #: end
        for i, part in enumerate(self.border.split(text)):
            ids += [self.whole[part]] if i % 2 else self.encode_part(part)
        return ids

    #: end
    def given_encode(self, text):
        #: if normalize
        text = unicodedata.normalize("given.normalize", text)
        #: end
        #: if space_before and not user_defined
        text = " " + text if text else text
        #: end
        ids = []
        #: if byte_level
        for word in filter(None, self.pattern.split(text)):
            word = word.encode("utf-8")
            #: if whole_words
            if word in self.ids:
                ids.append(self.ids[word])
                continue
            #: end
            #: if by_rank
            ids += [self.ids[part] for part in self.join([bytes([byte]) for byte in word])]
            #: else
            ids += self.join([self.byte_ids[byte] for byte in word])
            #: end
        return ids
        #: elif unigram
        for i, part in enumerate(text.split("\u2581")):
            # Pieces of the vocabulary have this mark for a space, so one in the text is bytes.
            ids += [self.byte_ids[byte] for byte in "\u2581".encode()] if i else []
            ids += self.most_probable(part)
        return ids
        #: elif by_rank
        for part in self.join([character.encode("utf-8") for character in text]):
            ids += [self.ids[part]] if part in self.ids else [self.byte_ids[b] for b in part]
        return ids
        #: else
        for character in text:
            piece = character.encode("utf-8")
            ids += [self.ids[piece]] if piece in self.ids else [self.byte_ids[b] for b in piece]
        return self.join(ids)
        #: end

    #: if unigram
    def most_probable(self, text):
        # Up to each place: the log probability, where the last token begins, and which it is. Sums
        # are rounded to float32, as SentencePiece's are.
        best = [(np.float32(0), 0, None)] + [(np.float32(-np.inf), 0, None)] * len(text)
        for start in range(len(text)):
            tokens = [(start + 1, np.float32(given.unknown_score), None)]
            tokens = [] if text[start] in self.known else tokens
            for end in range(start + 1, min(start + self.longest, len(text)) + 1):
                if text[start:end] in self.known:
                    tokens.append((end, *self.known[text[start:end]]))
            for end, score, token in tokens:
                total = best[start][0] + score
                if total > best[end][0]:
                    best[end] = (total, start, token)
        parts, end = [], len(text)
        while end:
            _, start, token = best[end]
            piece = text[start:end].encode("utf-8")
            parts.append([self.byte_ids[b] for b in piece] if token is None else [token])
            end = start
        return [token for part in reversed(parts) for token in part]

    #: else
    def join(self, parts):
        """Joins the two neighbours whose union ranks first, until no union is a token."""
        before, after = [*range(-1, len(parts) - 1)], [*range(1, len(parts) + 1)]
        queue = []

        def offer(i, j):
            if i < 0 or j == len(parts):
                return
            #: if by_rank
            both = parts[i] + parts[j]
            if both in self.ranks:
                heapq.heappush(queue, (self.ranks[both], i, parts[i], parts[j], both))
            #: else
            if (parts[i], parts[j]) in self.merges:
                rank, both = self.merges[parts[i], parts[j]]
                heapq.heappush(queue, (rank, i, parts[i], parts[j], both))
            #: end

        for j in range(1, len(parts)):
            offer(j - 1, j)
        while queue:
            _, i, left, right, both = heapq.heappop(queue)
            j = after[i]
            if parts[i] != left or j == len(parts) or parts[j] != right:
                continue  # one of the two has been joined with another meanwhile
            parts[i], parts[j], after[i] = both, None, after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [part for part in parts if part is not None]

    #: end


#: end
