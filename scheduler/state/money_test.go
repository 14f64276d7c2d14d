package state

import (
	"math"
	"math/big"
	"testing"

	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

func TestCost(t *testing.T) {
	for _, c := range []struct {
		perHour api.MicroUSD
		ms      int64
		want    api.MicroUSD
	}{
		{400_000, hourMS, 400_000},
		{400_000, 1, 1}, // rounded up
		{0, hourMS, 0},
		{1, hourMS + 1, 2},
		{-5, hourMS, 0},
		{5, -hourMS, 0},
		{math.MaxInt64, math.MaxInt64, maxMoney},
		{math.MaxInt64, hourMS, maxMoney},
		// The dearest job that its validation lets through: a billion dollars per
		// hour for each of 64 GPUs, for a week.
		{64_000_000_000 * api.Dollars, 168 * hourMS, maxMoney},
	} {
		if got := Cost(c.perHour, c.ms); got != c.want {
			t.Errorf("Cost(%d, %d) = %d, want %d", c.perHour, c.ms, got, c.want)
		}
	}
}

func TestMoneyMatchesBigIntegers(t *testing.T) {
	amount := rapid.Map(rapid.Int64Range(0, math.MaxInt64), func(n int64) api.MicroUSD { return api.MicroUSD(n) })
	capped := func(v *big.Int) api.MicroUSD {
		if v.Cmp(big.NewInt(int64(maxMoney))) > 0 {
			return maxMoney
		}
		return api.MicroUSD(v.Int64())
	}
	rapid.Check(t, func(t *rapid.T) {
		a, ms, n := amount.Draw(t, "amount"), rapid.Int64Min(0).Draw(t, "ms"), rapid.Uint64().Draw(t, "n")
		want := new(big.Int).Mul(big.NewInt(int64(a)), big.NewInt(ms))
		want.Add(want, big.NewInt(hourMS-1)).Div(want, big.NewInt(hourMS))
		if got := Cost(a, ms); got != capped(want) {
			t.Errorf("Cost(%d, %d) = %d, want %s", a, ms, got, want)
		}
		want = new(big.Int).Mul(big.NewInt(int64(a)), new(big.Int).SetUint64(n))
		if got := times(a, n); got != capped(want) {
			t.Errorf("times(%d, %d) = %d, want %s", a, n, got, want)
		}
		want = new(big.Int).Mul(big.NewInt(int64(a)), big.NewInt(FeePPM))
		if got := fee(a); int64(got) != want.Div(want, big.NewInt(1_000_000)).Int64() {
			t.Errorf("fee(%d) = %d, want %s", a, got, want)
		}
	})
}

func TestLeastBudget(t *testing.T) {
	spec := &musterpb.JobSpec{MaxPriceMicroUsdPerHour: 400_000, TimeoutMs: hourMS, Resources: &musterpb.Resources{Gpus: 2}}
	if got := LeastBudget(spec); got != 1_600_000 {
		t.Errorf("two GPUs for an hour, twice: %s", got)
	}
	spec.MaxPriceMicroUsdPerHour, spec.TimeoutMs, spec.Resources.Gpus = int64(1_000_000_000*api.Dollars), 168*hourMS, 64
	if got := LeastBudget(spec); got < 1_000_000_000*api.Dollars {
		t.Errorf("what nobody can pay may be had for %s", got)
	}
}
