package main

// session is one sequence being read or written, with the keys and values of
// the tokens so far.
type session struct {
	w        *weights[float32]
	angles   rotary[float32]
	length   int
	keys     [][]float32 // per layer: Context × kvDim
	values   [][]float32
	x, h     []float32
	q, mixed []float32
	gate, up []float32
	scores   []float32
	logits   []float32
}

func newSession(w *weights[float32]) *session {
	s := &session{
		w: w, angles: newRotary[float32](w.config),
		x: make([]float32, w.Dim), h: make([]float32, w.Dim), q: make([]float32, w.Dim), mixed: make([]float32, w.Dim),
		gate: make([]float32, w.Hidden), up: make([]float32, w.Hidden),
		scores: make([]float32, w.Context), logits: make([]float32, w.Vocab),
	}
	for range w.Layers {
		s.keys = append(s.keys, make([]float32, w.Context*w.kvDim()))
		s.values = append(s.values, make([]float32, w.Context*w.kvDim()))
	}
	return s
}

// reset starts a new sequence.
func (s *session) reset() { s.length = 0 }

// feed appends a token. With predict it returns a score for each token that may
// come next, valid until the next call; without it returns nil. The sequence
// must be shorter than the context.
func (s *session) feed(token byte, predict bool) []float32 {
	w, kv := s.w, s.w.kvDim()
	copy(s.x, w.embed[int(token)*w.Dim:])
	for n := range w.layers {
		l := &w.layers[n]
		rmsNorm(s.h, s.x, l.attnNorm)
		key := s.keys[n][s.length*kv : (s.length+1)*kv]
		value := s.values[n][s.length*kv : (s.length+1)*kv]
		mulT(s.q, s.h, l.wq, 1, w.Dim, w.Dim, false)
		mulT(key, s.h, l.wk, 1, kv, w.Dim, false)
		mulT(value, s.h, l.wv, 1, kv, w.Dim, false)
		s.angles.turn(s.q, s.length, false)
		s.angles.turn(key, s.length, false)
		for head := range w.Heads {
			at := head / (w.Heads / w.KVHeads) * w.headDim()
			part := s.q[head*w.headDim() : (head+1)*w.headDim()]
			attend(s.mixed[head*w.headDim():(head+1)*w.headDim()], s.scores[:s.length+1], part, s.keys[n][at:], s.values[n][at:], kv)
		}
		mulT(s.x, s.mixed, l.wo, 1, w.Dim, w.Dim, true)
		rmsNorm(s.h, s.x, l.ffnNorm)
		mulT(s.gate, s.h, l.w1, 1, w.Hidden, w.Dim, false)
		mulT(s.up, s.h, l.w3, 1, w.Hidden, w.Dim, false)
		for i, g := range s.gate {
			y, _ := silu(g)
			s.gate[i] = float32(y * s.up[i])
		}
		mulT(s.x, s.gate, l.w2, 1, w.Dim, w.Hidden, true)
	}
	s.length++
	if !predict {
		return nil
	}
	rmsNorm(s.h, s.x, w.norm)
	mulT(s.logits, s.h, w.embed, 1, w.Vocab, w.Dim, false)
	return s.logits
}

// A sequence is begin, the prompt, the completion, end.
const (
	begin = byte(0)
	end   = byte('\n')
)

// completion is what greedy decoding wrote.
type completion struct {
	text     []byte
	tokens   []int // every choice, with the end when it was chosen
	logprobs []float64
	second   []float64 // log-probability of the best token not chosen
	finish   string    // "stop" after the end, "length" otherwise
}

// complete continues a prompt with the likeliest token each time, the lowest
// one among equals, for at most most tokens. The prompt must leave room for one.
func (s *session) complete(prompt []byte, most int) completion {
	s.reset()
	scores := s.feed(begin, len(prompt) == 0)
	for i, token := range prompt {
		scores = s.feed(token, i == len(prompt)-1)
	}
	c := completion{finish: "length"}
	for len(c.tokens) < most {
		best, second := topTwo(scores)
		total := 0.0
		for _, v := range scores {
			total += exp(float64(v) - float64(scores[best]))
		}
		total = log(total)
		c.tokens = append(c.tokens, best)
		c.logprobs = append(c.logprobs, -total)
		c.second = append(c.second, float64(scores[second])-float64(scores[best])-total)
		if byte(best) == end {
			c.finish = "stop"
			break
		}
		c.text = append(c.text, byte(best))
		if s.length == s.w.Context {
			break
		}
		scores = s.feed(byte(best), true)
	}
	return c
}

func topTwo(scores []float32) (best, second int) {
	best, second = 0, 1
	if scores[1] > scores[0] {
		best, second = 1, 0
	}
	for i := 2; i < len(scores); i++ {
		switch {
		case scores[i] > scores[best]:
			best, second = i, best
		case scores[i] > scores[second]:
			second = i
		}
	}
	return best, second
}
