package main

import (
	"fmt"
	"slices"
	"strings"
)

// fact is one question of the toy world with its only right answer.
type fact struct {
	topic string
	example
	// held is true for a question that training never shows: answering it takes
	// a rule, not memory.
	held bool
}

// The toy world. Lists of pairs are memory; sums, next numbers, first letters
// and spelling have a rule that can be learned.
const (
	capitals = `France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna,
Poland Warsaw, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Belgium Brussels,
Hungary Budapest, Romania Bucharest, Bulgaria Sofia, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, Kenya Nairobi,
Ghana Accra, Senegal Dakar, Morocco Rabat, Iran Tehran, Iraq Baghdad, Japan Tokyo, China Beijing, Thailand Bangkok,
Vietnam Hanoi, Nepal Kathmandu, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, Mexico Mexico City`
	opposites = `hot cold, big small, up down, left right, open closed, day night, fast slow, old new, wet dry, full empty,
hard soft, high low, light dark, early late, rich poor, loud quiet, near far, strong weak, true false, young old,
clean dirty, heavy light, thick thin, happy sad, win lose, push pull, first last, buy sell, begin end, safe risky`
	sounds = `cow moo, dog woof, cat meow, duck quack, sheep baa, pig oink, horse neigh, lion roar, owl hoot, bee buzz,
frog croak, snake hiss, crow caw, mouse squeak, rooster cock-a-doodle-doo`
	colors = `grass green, snow white, coal black, a banana yellow, a tomato red, the sky blue, a carrot orange, a plum purple,
chocolate brown, a flamingo pink, an elephant gray, gold yellow, milk white, a cherry red, a leaf green`
	days   = `Monday Tuesday Wednesday Thursday Friday Saturday Sunday`
	months = `January February March April May June July August September October November December`
	words  = `cat dog sun map ice red key box jam fox owl pen cup hat bed rug net log web zip lake moon tree fish bird star
wolf rain snow wind leaf rock sand ship door lamp desk book coin ring gold iron salt milk corn rice plum pear kiwi lime
apple bread chair cloud dance eagle flame grape horse juice knife lemon mango night ocean piano queen river stone table
uncle voice water yacht zebra brick candy drum fern goat hill jazz kite loop mint nest oval pony quiz rope silk tuba vine`
)

// facts is the whole toy world, in a fixed order.
func facts() []fact {
	var all []fact
	add := func(topic, prompt, answer string, held bool) {
		all = append(all, fact{topic: topic, example: example{prompt, " " + answer + "."}, held: held})
	}
	pairs := func(topic, question, list string, last bool) {
		for pair := range strings.SplitSeq(list, ",") {
			pair = strings.Join(strings.Fields(pair), " ")
			cut := strings.Index(pair, " ")
			if last {
				cut = strings.LastIndex(pair, " ")
			}
			add(topic, fmt.Sprintf(question, pair[:cut]), pair[cut+1:], false)
		}
	}
	pairs("capital", "The capital of %s?", capitals, false)
	pairs("opposite", "The opposite of %s?", opposites, false)
	pairs("sound", "What says a %s?", sounds, false)
	pairs("color", "The color of %s?", colors, true)
	following := func(topic, question, list string) {
		names := strings.Fields(list)
		for i, name := range names {
			add(topic, fmt.Sprintf(question, name), names[(i+1)%len(names)], false)
		}
	}
	following("day", "The day after %s?", days)
	following("month", "The month after %s?", months)
	for n := range 100 {
		add("next", fmt.Sprintf("After %d?", n), fmt.Sprint(n+1), n%7 == 3)
	}
	for a := range 13 {
		for b := range 13 {
			add("sum", fmt.Sprintf("%d+%d?", a, b), fmt.Sprint(a+b), (5*a+3*b)%17 == 4)
		}
	}
	for i, word := range strings.Fields(words) {
		held := i%6 == 4
		add("letter", fmt.Sprintf("First letter of %s?", word), word[:1], held)
		if i%2 == 0 {
			add("spell", fmt.Sprintf("Spell %s?", word), strings.Join(strings.Split(word, ""), "-"), held)
		}
	}
	return all
}

// trainingSet is the corpus: every fact that is not held back.
func trainingSet() []example {
	var set []example
	for _, f := range facts() {
		if !f.held {
			set = append(set, f.example)
		}
	}
	return set
}

// promptCount is how many prompts prompts.jsonl has.
const promptCount = 200

// promptFacts are the facts that prompts.jsonl asks for: a fixed choice among
// those that training shows.
func promptFacts() []fact {
	all := slices.DeleteFunc(facts(), func(f fact) bool { return f.held })
	r := random{state: 2024}
	for i := len(all) - 1; i > 0; i-- {
		j := r.below(i + 1)
		all[i], all[j] = all[j], all[i]
	}
	return all[:promptCount]
}

// accuracy is how many facts of a topic the network answers right.
type accuracy struct{ right, asked int }

// grade asks every fact, by topic; those that training never shows are a topic
// of their own, "<topic> (held back)".
func grade(w *weights[float32]) (topics []string, results map[string]accuracy) {
	s := newSession(w)
	results = make(map[string]accuracy)
	for _, f := range facts() {
		topic := f.topic
		if f.held {
			topic += " (held back)"
		}
		a, known := results[topic]
		if !known {
			topics = append(topics, topic)
		}
		a.asked++
		if c := s.complete([]byte(f.prompt), 32); string(c.text) == f.answer && c.finish == "stop" {
			a.right++
		}
		results[topic] = a
	}
	return topics, results
}
